//! The sizes of a tower, and what every transformers configuration has.

use crate::Result;
use crate::config::ConfigFile;
use crate::layers::Activation;

/// Fields of every transformers configuration, and training settings, that change nothing in the
/// forward pass of CLIP or SigLIP. Old versions of transformers wrote all of them into each section.
pub(crate) const HARMLESS: [&str; 62] = [
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "logit_scale_init_value",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "projection_dim",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "transformers.js_config",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// Values of absent fields, which differ between towers.
pub(crate) struct Defaults {
    pub(crate) width: usize,
    pub(crate) mlp_width: usize,
    pub(crate) heads: usize,
    pub(crate) activation: &'static str,
    pub(crate) eps: f64,
}

/// The sizes of a transformer tower.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TowerConfig {
    pub(crate) width: usize,
    pub(crate) mlp_width: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) activation: Activation,
    pub(crate) eps: f64,
}

impl TowerConfig {
    pub(crate) fn read(fields: &ConfigFile, absent: &Defaults) -> Result<Self> {
        // The first one is what an absent field means.
        let mut known = vec!["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"];
        known.sort_by_key(|name| *name != absent.activation);
        let activation = match fields.choice("hidden_act", &known)? {
            "quick_gelu" => Activation::GeluQuick,
            "gelu" => Activation::GeluErf,
            "silu" => Activation::Silu,
            _ => Activation::GeluTanh,
        };
        let tower = Self {
            width: fields.size("hidden_size", absent.width)?,
            mlp_width: fields.size("intermediate_size", absent.mlp_width)?,
            layers: fields.size("num_hidden_layers", 12)?,
            heads: fields.size("num_attention_heads", absent.heads)?,
            activation,
            eps: fields.positive("layer_norm_eps", absent.eps)?,
        };
        if !tower.width.is_multiple_of(tower.heads) {
            let divisors = format!("a divisor of hidden_size {}", tower.width);
            return Err(fields.unsupported("num_attention_heads", divisors));
        }
        Ok(tower)
    }
}

/// Refuses a folder that was saved from another class.
pub(crate) fn only_architecture(fields: &ConfigFile, class: &'static str) -> Result<()> {
    fields.choice_list("architectures", &[class], &[class]).map(drop)
}
