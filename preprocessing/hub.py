"""Load configurations, tokenizers and weights of Hugging Face models: --model hf:NAME."""

from errors import UserError

MAX_TOKENS = 512  # unless --max-length is given


def from_hugging_face(kind: str, name: str):
    """Return transformers' `kind` (AutoConfig, AutoTokenizer, AutoModel) of a model, by its name or folder.

    Raises UserError if `transformers` is not installed or the model cannot be loaded.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"--model hf:{name} needs another library: pip install transformers.") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, kind).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model hf:{name}: the model cannot be loaded ({str(error).splitlines()[0]}).") from None


def load_tokenizer(name: str) -> tuple[str, int]:
    """Return (the tokenizer of a text encoder as JSON, how many tokens the encoder reads at most, up to MAX_TOKENS).

    Raises UserError if the model is not a text encoder, or its tokenizer not of the `tokenizers` library.
    """
    from tokenizers import Tokenizer

    config = from_hugging_face("AutoConfig", name)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UserError(f"--model hf:{name} is a {config.model_type}: only encoders of texts can be fine-tuned.")
    tokenizer = from_hugging_face("AutoTokenizer", name)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"--model hf:{name}: its tokenizer does not use the `tokenizers` library.")
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.no_padding()
    inner.no_truncation()
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    return inner.to_str(), min(MAX_TOKENS, positions, tokenizer.model_max_length)
