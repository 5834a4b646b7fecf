//! Generating text: a loaded model with an adapter, a sampler, and the loop between them.

mod sampler;
mod session;
mod stream;

pub(crate) use session::prompt_ids;

pub use sampler::{Sampler, SamplingOptions};
pub use session::{Finish, Session, load_weights};
pub use stream::TextStream;
