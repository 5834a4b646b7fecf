//! What a packed weight looks like: its code, block size and nesting, and the bytes they take.

/// Scales that share one nested absmax; fixed in bitsandbytes.
pub const NESTED_BLOCK_SIZE: usize = 256;

/// Which 16 values the codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    /// Quantiles of a normal distribution.
    Nf4,
    /// A 4-bit float.
    Fp4,
}

impl QuantType {
    /// `nf4` or `fp4`, as in `bnb_4bit_quant_type`.
    pub fn as_str(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        }
    }
}

/// How to quantize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockFormat {
    /// NF4 or FP4.
    pub quant_type: QuantType,
    /// Elements that share an absmax: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether absmax values are stored in 8 bits.
    pub double_quant: bool,
}

impl Default for BlockFormat {
    fn default() -> Self {
        BlockFormat { quant_type: QuantType::Nf4, block_size: 64, double_quant: true }
    }
}

impl BlockFormat {
    /// Bits that one weight takes on average in a large tensor.
    pub fn bits_per_weight(&self) -> f64 {
        let block = self.block_size as f64;
        let scale = if self.double_quant { 8.0 + 32.0 / NESTED_BLOCK_SIZE as f64 } else { 32.0 };
        4.0 + scale / block
    }

    /// Bytes of a tensor of `elements`: codes, scales and, nested, their scales and offset.
    pub fn packed_bytes(&self, elements: usize) -> usize {
        let blocks = elements.div_ceil(self.block_size);
        let scales = if self.double_quant {
            blocks + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE) + 4
        } else {
            4 * blocks
        };
        elements.div_ceil(2) + scales
    }
}
