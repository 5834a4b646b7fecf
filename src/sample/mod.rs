//! Generating text: a loaded model with an adapter, a sampler, and the loop between them.

mod adapted;
mod sampler;
mod session;
mod speaker;
mod stop_strings;
mod stream;

pub use adapted::AdaptedModel;
pub use sampler::{Sampler, SamplingOptions};
pub use session::Session;
pub use speaker::{Finish, Limits, Prompt, Speaker, Wish};
pub use stream::TextStream;
