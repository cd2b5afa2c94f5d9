"""smolagents: a ToolCallingAgent, or a CodeAgent that writes Python."""

from smolagents import CodeAgent, OpenAIServerModel, ToolCallingAgent, tool
from tools import BASE_URL, KEY, MODE, TASK, add, answer, read_file

model = OpenAIServerModel("policy", api_base=BASE_URL, api_key=KEY)
tools = [tool(add), tool(read_file)]
if MODE == "code":
    answer(CodeAgent(tools=tools, model=model, verbosity_level=0).run(TASK))
else:
    answer(ToolCallingAgent(tools=tools, model=model, verbosity_level=0).run(TASK))
