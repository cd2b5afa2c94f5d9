"""Templates, each with one property, and what to look at in a report."""

from tokentape.audit import Report

# ChatML in which nothing is ever rewritten: thoughts stay, calls stay.
PLAIN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is string KEEP %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in (message.tool_calls or []) CALLS %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\nOPENING' }}{%- endif %}
"""


def template(keep: str = "", calls: str = "", begin: str = "", opening: str = "") -> str:
    """`PLAIN` with a condition on thoughts, a slice of the calls, a text before it, one behind its prompt."""
    source = PLAIN.replace("KEEP", keep).replace("CALLS", calls).replace("OPENING", opening)
    return begin + source


def outcomes(report: Report) -> dict[str, str]:
    """Each case's reason or outcome, by its name."""
    return {case.name: case.reason or case.outcome.value for case in report.cases}


def kinds(report: Report) -> set[str]:
    return {defect.kind for defect in report.defects}
