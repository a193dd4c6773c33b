"""ChatGLM2-6B on today's transformers.

Importing this package registers its classes with transformers' Auto classes, so that
`AutoModel.from_pretrained(folder)` runs this code and none from the checkpoint folder.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .configuration_chatglm import ChatGLMConfig
from .generation_chatglm import ChatGLMCache
from .modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
)
from .quantization import ChatGLMQuantizationConfig
from .sampling_chatglm import CHAT_DEFAULTS
from .tokenization_chatglm import ChatGLMTokenizer

__all__ = [
    "CHAT_DEFAULTS",
    "ChatGLMCache",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMQuantizationConfig",
    "ChatGLMTokenizer",
]

AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(
    ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True
)
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer, exist_ok=True)
