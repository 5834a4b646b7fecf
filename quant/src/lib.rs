//! 4-bit blocks compatible with bitsandbytes.
