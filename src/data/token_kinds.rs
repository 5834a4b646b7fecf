//! What a token of a GGUF file is: its number in `tokenizer.ggml.token_type`. Source: llama.cpp's
//! `enum llama_token_type`.

pub const NORMAL: i32 = 1;
pub const UNKNOWN: i32 = 2;
pub const CONTROL: i32 = 3;
pub const USER_DEFINED: i32 = 4;
pub const UNUSED: i32 = 5;
pub const BYTE: i32 = 6;
