//! The layers composed of candle's operations: the path of every device that has no kernels here, and
//! an independent implementation to test the kernels against.

mod activation;
mod attention;
mod conv;
mod norm;

pub(super) use activation::{activation, activation_slope};
pub(super) use attention::{Scores, attention, attention_backward};
pub(crate) use conv::MOST_COLUMNS;
pub(super) use conv::{conv2d, conv2d_backward, linear, upsample2x, upsample2x_backward};
pub(super) use norm::{RowNorm, group_norm, group_norm_backward, row_norm, row_norm_backward};
