"""The model directory: what a gateway reads of it, and whether it fits together."""

from dataclasses import dataclass
from pathlib import Path

from tokentape.audit import audit
from tokentape.audit.report import Severity
from tokentape.doctor.checks import Check, Checks
from tokentape.errors import ConfigError, TokentapeError, one_line
from tokentape.formats import FORMATS, Format, detect
from tokentape.model import ModelSizes, model_directory, model_sizes
from tokentape.render import Frame, Renderer
from tokentape.template import RESERVED, ChatTemplate
from tokentape.tokenizer import Tokenizer
from tokentape.types import Message

HELLO = Message(role="user", content="Say hello, please.")
"""What a model and an engine are tried with."""
_FILES = "copy the model's own tokenizer.json, tokenizer_config.json, config.json and chat template into it"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that could be read; `vocab_size` ids may be sent to an engine that has it."""

    directory: Path
    renderer: Renderer
    sizes: ModelSizes

    @property
    def vocab_size(self) -> int:
        """The configuration's, else the tokenizer's."""
        return self.sizes.vocab_size or self.renderer.tokenizer.vocab_size


def check_model(name: str, formats: tuple[Format, ...] = ()) -> tuple[Model | None, list[Check]]:
    """Everything about a model; and the model, if a gateway could have it. Nothing is downloaded."""
    checks = Checks("model")
    try:
        directory = model_directory(name, download=False)
    except ConfigError as error:
        advice = "name a model directory, or a hub id that is in the cache: `tokentape audit` fetches one"
        checks.wrong("directory", one_line(error), advice)
        return None, checks.found
    checks.ok("directory", str(directory))
    sizes = _sizes(checks, directory)
    tokenizer = _tokenizer(checks, directory, sizes)
    template = _template(checks, directory)
    if tokenizer is None or template is None or sizes is None:
        return None, checks.found
    renderer = Renderer.from_dir(directory, num_ids=sizes.vocab_size)
    _end(checks, directory, renderer, sizes)
    if not _prompt(checks, renderer):
        return None, checks.found
    _format(checks, template, formats)
    _extension(checks, directory, name, formats)
    return Model(directory, renderer, sizes), checks.found


def _sizes(checks: Checks, directory: Path) -> ModelSizes | None:
    try:
        sizes = model_sizes(directory)
    except ConfigError as error:
        checks.wrong("configuration", one_line(error), "take config.json from the model's repository again")
        return None
    missing = [
        what
        for what, size in (("vocabulary", sizes.vocab_size), ("context length", sizes.context_length))
        if size is None
    ]
    if missing:
        found = f"config.json does not say: {', '.join(missing)}"
        checks.warn("configuration", found, f"the engine must say it, else --context-length; {_FILES}")
    else:
        checks.ok("configuration", f"{sizes.vocab_size:,} ids, context of {sizes.context_length:,} tokens")
    return sizes


def _tokenizer(checks: Checks, directory: Path, sizes: ModelSizes | None) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer(directory / "tokenizer.json")
    except ConfigError as error:
        checks.wrong("tokenizer", one_line(error), _FILES)
        return None
    found = f"{tokenizer.vocab_size:,} ids, read with {tokenizer.backend_name}"
    if not tokenizer.vocab_size:
        checks.wrong("tokenizer", f"{directory / 'tokenizer.json'} has no tokens", _FILES)
        return None
    most = sizes.vocab_size if sizes is not None else None
    if most is not None and tokenizer.vocab_size > most:
        advice = (
            "tokenizer.json and config.json are not one model's: an id beyond the vocabulary kills SGLang"
        )
        checks.wrong("tokenizer", f"{found}, but the model has {most:,}", f"{advice}; {_FILES}")
    else:
        checks.ok("tokenizer", found)
    return tokenizer


def _template(checks: Checks, directory: Path) -> ChatTemplate | None:
    try:
        template = ChatTemplate.from_dir(directory)
    except ConfigError as error:
        advice = "write the model's own template to chat_template.jinja in the directory"
        checks.wrong("template", one_line(error), advice)
        return None
    reads = ", ".join(sorted(template.variables - RESERVED)) or "none"
    checks.ok("template", f"compiles; arguments that it reads: {reads}")
    return template


def _end(checks: Checks, directory: Path, renderer: Renderer, sizes: ModelSizes) -> None:
    eos_ids, most = (
        sizes.eos_ids | renderer.eos_ids,
        max(renderer.tokenizer.vocab_size, sizes.vocab_size or 0),
    )
    path = directory / "generation_config.json"
    if not eos_ids:
        advice = f'say it in {path}: {{"eos_token_id": …}}; without it turns end only by length'
        checks.wrong("end of turn", "no file names an eos token", advice)
    elif beyond := sorted(eos for eos in eos_ids if not 0 <= eos < most):
        checks.wrong(
            "end of turn", f"eos_token_id {beyond} is no id of the tokenizer", f"correct it in {path}"
        )
    else:
        checks.ok("end of turn", f"eos {', '.join(map(str, sorted(eos_ids)))}")


def _prompt(checks: Checks, renderer: Renderer) -> bool:
    """A template that compiles may still refuse the simplest of conversations."""
    try:
        num_tokens = len(renderer.render(Frame(), [HELLO]).run)
    except TokentapeError as error:
        advice = "write the model's own template to chat_template.jinja in the directory"
        checks.wrong("prompt", one_line(error), advice)
        return False
    checks.ok("prompt", f"a first message of three words makes {num_tokens} tokens")
    return True


def _format(checks: Checks, template: ChatTemplate, formats: tuple[Format, ...]) -> None:
    detected = detect(template, formats=(*formats, *FORMATS))
    found = f"{detected.format.name} ({detected.why})"
    if detected.told:
        checks.ok("format", found)
    else:
        advice = (
            "name one with --tool-format, or describe one with --formats; else calls reach agents as text"
        )
        checks.warn("format", found, advice)


def _extension(checks: Checks, directory: Path, name: str, formats: tuple[Format, ...]) -> None:
    """What `tokentape audit` says in full."""
    try:
        report = audit(directory, model=name, formats=formats)
    except ConfigError as error:
        checks.warn("exact extension", f"not checked: {one_line(error)}", "correct that first")
        return
    errors = [defect.kind for defect in report.defects if defect.severity is Severity.ERROR]
    if report.exact:
        checks.ok("exact extension", "multi-turn tool use is exact: one tape a rollout")
        return
    found = f"multi-turn tool use is not exact{': ' if errors else ''}{', '.join(errors)}"
    advice = f"tokentape audit --model {name} says why; {'; '.join(report.advice[:2])}"
    checks.warn("exact extension", found, advice)
