//! Text to token ids, as the transformers library does it.

mod clip;
mod file;

pub use clip::ClipTokenizer;
pub use file::FileTokenizer;

/// Fields of `tokenizer_config.json` that change no id: how texts are decoded, how windows are cut
/// and filled (which is done here, for the model), names, and marks that the tokenizer's own files
/// hold.
const HARMLESS: [&str; 39] = [
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "bos_token",
    "chat_template",
    "clean_up_tokenization_spaces",
    "cls_token",
    "device_map",
    "eos_token",
    "errors",
    "extra_ids",
    "extra_special_tokens",
    "from_slow",
    "full_tokenizer_file",
    "is_local",
    "legacy",
    "local_files_only",
    "mask_token",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token",
    "pad_token_type_id",
    "padding",
    "processor_class",
    "sep_token",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "unk_token",
    "use_default_system_prompt",
];

/// A text as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPrompt {
    /// At least one window, each of the tokenizer's full length: marks, tokens, padding.
    pub chunks: Vec<Vec<u32>>,
    /// How many tokens the text has, marks and padding not counted.
    pub tokens: usize,
}
