"""Calls of tools: how models of each kind write them, read as they come, and forced.

shown     a chat template -> the format that it shows
reader    a text as it comes -> content, reasoning, calls
json_text JSON as it comes                    typed     plain texts -> the JSON of a schema
form      the grammar of an answer            format    what every format has
hermes    Hermes, Qwen 2.5 and 3              qwen_xml  Qwen3-Coder, Qwen 3.5
llama     Llama 3 and 4                       mistral   Mistral, before v11 and since
glm       GLM 4.5, 4.7                        deepseek  DeepSeek V3, V3.1, V3.2 and later
harmony   gpt-oss                             kimi      Kimi K2, K3
gemma     Gemma 4, FunctionGemma              granite   Granite 3
command_r Command R7B and later               smollm3   SmolLM3
plain     ours, for templates without tools   choice    what a request says of its tools
whole     the events of an answer together
"""
