"""The conversation formats of published weights, as Jinja chat templates."""

from mova_core.data import IMAGE_MARK

_SYSTEM = (
    "{% set said = messages[0].content if messages[0].role == 'system' else SYSTEM %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
)
_MARKED = (  # every turn between marks that name its role, as ChatML and Llama 3 have it
    "{{ OPEN + 'system' + SHUT + said + END }}"
    "{% for turn in turns %}{{ OPEN + turn.role + SHUT + turn.content + END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ OPEN + 'assistant' + SHUT }}{% endif %}"
)
_CHATML = "{% set OPEN, SHUT, END = '<|im_start|>', '\n', '<|im_end|>' %}" + _SYSTEM + _MARKED

# The formats that published weights were trained on, as Jinja templates. A tokenizer's own marks (<s>) go before them.
CHAT_FORMATS = {
    "vicuna_v1": "{% set SYSTEM = 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' %}" + _SYSTEM + "{{ said }}"
    "{% for turn in turns %}{% if turn.role == 'user' %}{{ ' ' if loop.first }}{{ 'USER: ' + turn.content + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + turn.content + '</s>' }}{% endif %}{% endfor %}",
    "llama_2": "{% set SYSTEM = 'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don\\'t know the "
    "answer to a question, please don\\'t share false information.' %}" + _SYSTEM + "{% for turn in turns %}"
    "{% if turn.role == 'user' %}{{ '<s>' if not loop.first }}{{ '[INST] ' }}"
    "{% if loop.first %}{{ '<<SYS>>\n' + said + '\n<</SYS>>\n\n' }}{% endif %}{{ turn.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn.content + ' </s>' }}{% endif %}{% endfor %}",
    "plain": "{% for turn in messages %}{{ turn.content + '\n' if turn.role == 'assistant' else "
    f"'{IMAGE_MARK}' * turn.content.count('{IMAGE_MARK}') }}}}{{% endfor %}}",  # captions: nothing is asked
    "mpt": "{% set SYSTEM = 'A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers.' %}" + _CHATML,
    "chatml": "{% set SYSTEM = 'Answer the questions.' %}" + _CHATML,  # Hermes-Yi
    # Begun twice by the tokenizer's own mark and this one, as published.
    "mova_llama3": "{% set SYSTEM = 'You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language.' %}"
    "{% set OPEN, SHUT, END = '<|start_header_id|>', '<|end_header_id|>\n\n', '<|eot_id|>' %}"
    + _SYSTEM
    + "{{ '<|begin_of_text|>' }}"
    + _MARKED,
}

END_MARKS = {  # the token that ends an assistant turn, where a format has another one than the tokenizer's own
    "mpt": "<|im_end|>",
    "chatml": "<|im_end|>",
    "mova_llama3": "<|eot_id|>",
}

# For a tokenizer that brings no chat template. A reply starts after a line break, so its first token is the same whether
# the reply is read or generated.
DEFAULT_TEMPLATE = (
    "{% for turn in messages %}"
    "{% if turn.role == 'assistant' %}{{ 'ASSISTANT:\n' + turn.content + eos_token + '\n' }}"
    "{% elif turn.role == 'user' %}{{ 'USER: ' + turn.content + '\n' }}"
    "{% else %}{{ turn.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)


def check_chat_format(name: str | None) -> str | None:
    """Returns `name`.

    Raises:
        ValueError: neither None nor one of `CHAT_FORMATS`.
    """
    if name is not None and name not in CHAT_FORMATS:
        raise ValueError(f"no chat format {name!r}: there are {', '.join(CHAT_FORMATS)}")
    return name
