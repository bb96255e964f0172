"""Chat templates in the shapes of well-known model families, written from their documented formats.

Each comes with the text that it has to render. The texts are typed by hand and not rendered.
"""

from dataclasses import dataclass

from parse.reasoning import ReasoningState


@dataclass(frozen=True)
class Family:
    template: str
    special_tokens: tuple[str, ...]
    prompt: str
    """One user message, "Hi", with the settings that the template has by default."""
    reasoning: ReasoningState
    prompt_without_reasoning: str
    """The same with `enable_thinking` set to false."""
    suffix: str
    """What follows a draft. {} stands for the verification prompt."""
    bos: str = ""
    eos: str = ""


CHATML_TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
CHATML_HEADER = "<|im_start|>assistant\n"
CHATML = ("<|im_start|>", "<|im_end|>")
HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
NEXT_TURN = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
EMPTY_BLOCK = "<think>\n\n</think>\n\n"


def chatml(system: str, header: str, history: str = "message.content") -> str:
    """ChatML with a default system message. `history` is the expression for an earlier answer."""
    return (
        "{% if messages[0].role != 'system' %}{{ '" + system + "' }}{% endif %}"
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' + " + history + " + '<|im_end|>\n' }}"
        "{% else %}" + CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + header + "{% endif %}"
    )


WITHOUT_THOUGHTS = "message.content.split('</think>')[-1].lstrip('\n')"

QWEN_25_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOL_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

FAMILIES = {
    "Qwen2.5": Family(
        chatml(QWEN_25_SYSTEM, CHATML_HEADER), CHATML, QWEN_25_SYSTEM + HI, "none", QWEN_25_SYSTEM + HI, NEXT_TURN
    ),
    "Qwen3": Family(
        chatml(
            "",
            CHATML_HEADER
            + "{% if enable_thinking is defined and enable_thinking is false %}"
            + "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
            WITHOUT_THOUGHTS,
        ),
        CHATML,
        HI,
        "expected",
        HI + EMPTY_BLOCK,
        NEXT_TURN + EMPTY_BLOCK,
    ),
    "Qwen3-Instruct-2507": Family(chatml("", CHATML_HEADER, WITHOUT_THOUGHTS), CHATML, HI, "none", HI, NEXT_TURN),
    "Qwen3-Thinking-2507": Family(
        chatml("", CHATML_HEADER + "{{ '<think>\n' }}", WITHOUT_THOUGHTS),
        CHATML,
        HI + "<think>\n",
        "open",
        HI + EMPTY_BLOCK,
        NEXT_TURN + EMPTY_BLOCK,
    ),
    "QwQ": Family(
        chatml("", CHATML_HEADER + "{{ '<think>\n' }}", "message.content.split('</think>')[-1]"),
        CHATML,
        HI + "<think>\n",
        "open",
        HI + EMPTY_BLOCK,
        NEXT_TURN + EMPTY_BLOCK,
    ),
    "SmolLM2": Family(
        chatml(SMOL_SYSTEM, CHATML_HEADER), CHATML, SMOL_SYSTEM + HI, "none", SMOL_SYSTEM + HI, NEXT_TURN
    ),
    "SmolLM3": Family(
        "{% set thinks = enable_thinking is not defined or enable_thinking %}"
        "{{ '<|im_start|>system\n## Metadata\n\nReasoning Mode: ' + ('/think' if thinks else '/no_think') "
        "+ '\n\n<|im_end|>\n' }}"
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') "
        "+ message.content.lstrip('\n') + '<|im_end|>\n' }}"
        "{% elif message.role == 'user' %}" + CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}"
        "{% endif %}",
        CHATML,
        "<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n<|im_end|>\n" + HI,
        "expected",
        "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n<|im_end|>\n" + HI + "<think>\n\n</think>\n",
        NEXT_TURN + "<think>\n\n</think>\n",
    ),
    "Llama 3": Family(
        "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}{{ '<|eot_id|>' }}"
        "{% for message in messages if message.role != 'system' %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "none",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>",
    ),
    "Gemma 3": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' "
        "+ (first if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "none",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        bos="<bos>",
    ),
    "Phi-4": Family(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*CHATML, "<|im_sep|>"),
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        "none",
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|><|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
    ),
    "Mistral": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST]' + message.content + '[/INST]' }}{% elif message.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}{% else %}"
        "{{ message.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "<s>[INST]Hi[/INST]",
        "none",
        "<s>[INST]Hi[/INST]",
        "</s>[INST]{}[/INST]",
        bos="<s>",
        eos="</s>",
    ),
    "GLM-4.5": Family(
        "{% set quiet = enable_thinking is defined and not enable_thinking %}{{ '[gMASK]<sop>' }}"
        "{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '<|user|>\n' + message.content + ('/nothink' if quiet else '') }}"
        "{% elif message.role == 'assistant' %}{{ '<|assistant|>\n<think></think>\n' + message.content | trim }}"
        "{% else %}{{ '<|system|>\n' + message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' + ('\n<think></think>' if quiet else '') }}{% endif %}",
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        "[gMASK]<sop><|user|>\nHi<|assistant|>",
        "expected",
        "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>",
        "<|user|>\n{}/nothink<|assistant|>\n<think></think>",
    ),
    "DeepSeek-R1 distills": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '<｜User｜>' + message.content }}{% elif message.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n",
        "open",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>" + EMPTY_BLOCK,
        "<｜end▁of▁sentence｜><｜User｜>{}<｜Assistant｜>" + EMPTY_BLOCK,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "OLMo 2": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + message.content + eos_token + ('' if loop.last else '\n') }}"
        "{% else %}{{ '<|' + message.role + '|>\n' + message.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|endoftext|>",),
        "<|endoftext|><|user|>\nHi\n<|assistant|>\n",
        "none",
        "<|endoftext|><|user|>\nHi\n<|assistant|>\n",
        "<|endoftext|>\n<|user|>\n{}\n<|assistant|>\n",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "Granite 3.3": Family(
        "{% set system = 'Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM.' %}"
        "{% if thinking %}{% set system = system + ' Respond with <think></think> before <response></response>.' %}"
        "{% endif %}{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
        "{% for message in messages %}"
        "{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "none",
        "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nYou are Granite, developed by IBM."
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>",
    ),
}
