//! The tables: NF4 and FP4 code values and decision rules, and two 256-entry dynamic maps, signed and
//! unsigned.
//!
//! Sources: QLoRA, arXiv 2305.14314, appendix E; bitsandbytes `functional.py` (`get_4bit_type`,
//! `create_dynamic_map`) and `backends/default/ops.py` (`_get_4bit_quantize_bounds`).

use crate::format::QuantType;

/// NF4 values by code: quantiles of a normal distribution, normalised to [-1, 1].
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Midpoints of [`NF4`] as bitsandbytes rounds them; a value above the k-th has a code above k.
const NF4_THRESHOLDS: [f32; 15] = [
    -0.848_096_4,
    -0.610_632_9,
    -0.459_995_27,
    -0.339_679_42,
    -0.234_607_4,
    -0.137_911_74,
    -0.045_525_018,
    0.039_790_15,
    0.120_255_25,
    0.203_521_25,
    0.292_013_76,
    0.389_312_54,
    0.501_663_45,
    0.642_786_9,
    0.861_478_45,
];

/// FP4 values by code: a sign, two exponent bits and one mantissa bit, normalised to [-1, 1].
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// FP4 codes by ascending value; of the two zeros, bitsandbytes' sort puts the positive one first.
pub(crate) const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Midpoints of [`FP4`] in [`FP4_ORDER`]; a value above the k-th is above the k-th code's.
const FP4_THRESHOLDS: [f32; 15] = [
    -0.833_333_4,
    -0.583_333_4,
    -0.416_666_7,
    -0.291_666_7,
    -0.208_333_34,
    -0.085_937_5,
    -0.002_604_166_7,
    0.0,
    0.002_604_166_7,
    0.085_937_5,
    0.208_333_34,
    0.291_666_7,
    0.416_666_7,
    0.583_333_4,
    0.833_333_4,
];

impl QuantType {
    /// The 16 values that codes stand for.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            QuantType::Nf4 => &NF4,
            QuantType::Fp4 => &FP4,
        }
    }

    /// The 15 values that part the codes, ascending.
    pub(crate) fn thresholds(self) -> &'static [f32; 15] {
        match self {
            QuantType::Nf4 => &NF4_THRESHOLDS,
            QuantType::Fp4 => &FP4_THRESHOLDS,
        }
    }
}

/// The signed 8-bit dynamic map of nested scales, ascending; index 127 is 0, 255 is 1.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: [f32; 256] = floats_of(&DYNAMIC_MAP_BITS);
    &MAP
}

/// Bits of `create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)`.
#[rustfmt::skip]
const DYNAMIC_MAP_BITS: [u32; 256] = [
    0xbf7e_3333, 0xbf7a_999a, 0xbf77_0000, 0xbf73_6666, 0xbf6f_cccd, 0xbf6c_3333, 0xbf68_999a, 0xbf65_0000,
    0xbf61_6666, 0xbf5d_cccd, 0xbf5a_3333, 0xbf56_999a, 0xbf53_0000, 0xbf4f_6666, 0xbf4b_cccd, 0xbf48_3333,
    0xbf44_999a, 0xbf41_0000, 0xbf3d_6666, 0xbf39_cccd, 0xbf36_3334, 0xbf32_999a, 0xbf2f_0000, 0xbf2b_6666,
    0xbf27_cccd, 0xbf24_3334, 0xbf20_999a, 0xbf1d_0000, 0xbf19_6666, 0xbf15_cccd, 0xbf12_3334, 0xbf0e_999a,
    0xbf0b_0000, 0xbf07_6666, 0xbf03_cccc, 0xbf00_3333, 0xbef9_3332, 0xbef2_0000, 0xbeea_cccc, 0xbee3_999a,
    0xbedc_6666, 0xbed5_3333, 0xbece_0000, 0xbec6_cccc, 0xbebf_999a, 0xbeb8_6666, 0xbeb1_3333, 0xbeaa_0000,
    0xbea2_cccc, 0xbe9b_999a, 0xbe94_6666, 0xbe8d_3334, 0xbe86_0000, 0xbe7d_9999, 0xbe6f_3333, 0xbe60_cccd,
    0xbe52_6666, 0xbe44_0000, 0xbe35_999a, 0xbe27_3333, 0xbe18_cccd, 0xbe0a_6666, 0xbdf8_0000, 0xbddb_3334,
    0xbdc9_eb85, 0xbdc4_28f7, 0xbdbe_6667, 0xbdb8_a3d7, 0xbdb2_e148, 0xbdad_1eb8, 0xbda7_5c2a, 0xbda1_999a,
    0xbd9b_d70a, 0xbd96_147b, 0xbd90_51eb, 0xbd8a_8f5d, 0xbd84_cccd, 0xbd7e_147b, 0xbd72_8f5d, 0xbd67_0a3d,
    0xbd5b_851f, 0xbd50_0000, 0xbd44_7ae1, 0xbd38_f5c3, 0xbd2d_70a3, 0xbd21_eb85, 0xbd16_6667, 0xbd0a_e148,
    0xbcfe_b852, 0xbce7_ae15, 0xbcd0_a3d7, 0xbcb9_999a, 0xbca2_8f5d, 0xbc8b_851f, 0xbc68_f5c3, 0xbc3a_e148,
    0xbc1f_3b64, 0xbc16_0418, 0xbc0c_cccd, 0xbc03_9581, 0xbbf4_bc6a, 0xbbe2_4dd3, 0xbbcf_df3b, 0xbbbd_70a4,
    0xbbab_020d, 0xbb98_9374, 0xbb86_24dd, 0xbb67_6c8a, 0xbb42_8f5c, 0xbb1d_b22d, 0xbaf1_a9fc, 0xbaa7_ef9d,
    0xba77_65ff, 0xba59_e83e, 0xba3c_6a80, 0xba1e_ecc1, 0xba01_6f01, 0xb9c7_e283, 0xb98c_e705, 0xb923_d70b,
    0xb8ba_1f4b, 0xb88a_efb3, 0xb837_8034, 0xb7b2_4206, 0xb702_05ff, 0xb65a_1a94, 0xb513_a3b7, 0x0000_0000,
    0x3513_a3b7, 0x365a_1a94, 0x3702_05ff, 0x37b2_4206, 0x3837_8034, 0x388a_efb3, 0x38ba_1f4b, 0x3923_d70b,
    0x398c_e705, 0x39c7_e283, 0x3a01_6f01, 0x3a1e_ecc1, 0x3a3c_6a80, 0x3a59_e83e, 0x3a77_65ff, 0x3aa7_ef9d,
    0x3af1_a9fc, 0x3b1d_b22d, 0x3b42_8f5c, 0x3b67_6c8a, 0x3b86_24dd, 0x3b98_9374, 0x3bab_020d, 0x3bbd_70a4,
    0x3bcf_df3b, 0x3be2_4dd3, 0x3bf4_bc6a, 0x3c03_9581, 0x3c0c_cccd, 0x3c16_0418, 0x3c1f_3b64, 0x3c3a_e148,
    0x3c68_f5c3, 0x3c8b_851f, 0x3ca2_8f5d, 0x3cb9_999a, 0x3cd0_a3d7, 0x3ce7_ae15, 0x3cfe_b852, 0x3d0a_e148,
    0x3d16_6667, 0x3d21_eb85, 0x3d2d_70a3, 0x3d38_f5c3, 0x3d44_7ae1, 0x3d50_0000, 0x3d5b_851f, 0x3d67_0a3d,
    0x3d72_8f5d, 0x3d7e_147b, 0x3d84_cccd, 0x3d8a_8f5d, 0x3d90_51eb, 0x3d96_147b, 0x3d9b_d70a, 0x3da1_999a,
    0x3da7_5c2a, 0x3dad_1eb8, 0x3db2_e148, 0x3db8_a3d7, 0x3dbe_6667, 0x3dc4_28f7, 0x3dc9_eb85, 0x3ddb_3334,
    0x3df8_0000, 0x3e0a_6666, 0x3e18_cccd, 0x3e27_3333, 0x3e35_999a, 0x3e44_0000, 0x3e52_6666, 0x3e60_cccd,
    0x3e6f_3333, 0x3e7d_9999, 0x3e86_0000, 0x3e8d_3334, 0x3e94_6666, 0x3e9b_999a, 0x3ea2_cccc, 0x3eaa_0000,
    0x3eb1_3333, 0x3eb8_6666, 0x3ebf_999a, 0x3ec6_cccc, 0x3ece_0000, 0x3ed5_3333, 0x3edc_6666, 0x3ee3_999a,
    0x3eea_cccc, 0x3ef2_0000, 0x3ef9_3332, 0x3f00_3333, 0x3f03_cccc, 0x3f07_6666, 0x3f0b_0000, 0x3f0e_999a,
    0x3f12_3334, 0x3f15_cccd, 0x3f19_6666, 0x3f1d_0000, 0x3f20_999a, 0x3f24_3334, 0x3f27_cccd, 0x3f2b_6666,
    0x3f2f_0000, 0x3f32_999a, 0x3f36_3334, 0x3f39_cccd, 0x3f3d_6666, 0x3f41_0000, 0x3f44_999a, 0x3f48_3333,
    0x3f4b_cccd, 0x3f4f_6666, 0x3f53_0000, 0x3f56_999a, 0x3f5a_3333, 0x3f5d_cccd, 0x3f61_6666, 0x3f65_0000,
    0x3f68_999a, 0x3f6c_3333, 0x3f6f_cccd, 0x3f73_6666, 0x3f77_0000, 0x3f7a_999a, 0x3f7e_3333, 0x3f80_0000,
];

/// The unsigned 8-bit dynamic map of second moments, ascending; index 0 is 0, 255 is 1.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: [f32; 256] = floats_of(&UNSIGNED_DYNAMIC_MAP_BITS);
    &MAP
}

const fn floats_of(bits: &[u32; 256]) -> [f32; 256] {
    let (mut floats, mut i) = ([0.0; 256], 0);
    while i < 256 {
        floats[i] = f32::from_bits(bits[i]);
        i += 1;
    }
    floats
}

/// Bits of `create_dynamic_map(signed=False, max_exponent_bits=7, total_bits=8)`.
#[rustfmt::skip]
const UNSIGNED_DYNAMIC_MAP_BITS: [u32; 256] = [
    0x0000_0000, 0x34ae_7baa, 0x3550_0998, 0x360e_9b38, 0x3692_ccf6, 0x36de_4c51, 0x3714_e5d5, 0x3783_126e,
    0x37e1_71a0, 0x381f_e868, 0x384f_1800, 0x387e_479a, 0x3896_bb99, 0x38ae_5364, 0x38c5_eb31, 0x3906_594b,
    0x3941_54ca, 0x397c_5049, 0x399b_a5e4, 0x39b9_23a2, 0x39d6_a163, 0x39f4_1f22, 0x3a08_ce71, 0x3a17_8d50,
    0x3a26_4c30, 0x3a35_0b10, 0x3a43_c9ef, 0x3a52_88d0, 0x3a61_47af, 0x3a70_068e, 0x3a7e_c56e, 0x3a95_8106,
    0x3aba_5e35, 0x3adf_3b64, 0x3b02_0c4a, 0x3b14_7ae1, 0x3b26_e978, 0x3b39_5810, 0x3b4b_c6a7, 0x3b5e_3540,
    0x3b70_a3d7, 0x3b81_8937, 0x3b8a_c082, 0x3b93_f7cf, 0x3b9d_2f1a, 0x3ba6_6666, 0x3baf_9db2, 0x3bb8_d4fd,
    0x3bc2_0c4a, 0x3bcb_4395, 0x3bd4_7ae1, 0x3bdd_b22e, 0x3be6_e978, 0x3bf0_20c5, 0x3bf9_580f, 0x3c01_47ae,
    0x3c05_e354, 0x3c0a_7ef9, 0x3c0f_1aa0, 0x3c13_b645, 0x3c18_51eb, 0x3c1c_ed92, 0x3c21_8937, 0x3c2f_5c2a,
    0x3c46_6667, 0x3c5d_70a3, 0x3c74_7ae2, 0x3c85_c28f, 0x3c91_47af, 0x3c9c_cccd, 0x3ca8_51eb, 0x3cb3_d70b,
    0x3cbf_5c29, 0x3cca_e147, 0x3cd6_6667, 0x3ce1_eb87, 0x3ced_70a3, 0x3cf8_f5c3, 0x3d02_3d70, 0x3d08_0000,
    0x3d0d_c28f, 0x3d13_851f, 0x3d19_47af, 0x3d1f_0a3d, 0x3d24_cccd, 0x3d2a_8f5c, 0x3d30_51eb, 0x3d36_147b,
    0x3d3b_d70a, 0x3d41_999a, 0x3d47_5c28, 0x3d4d_1eb8, 0x3d52_e147, 0x3d58_a3d7, 0x3d5e_6667, 0x3d64_28f7,
    0x3d69_eb87, 0x3d6f_ae15, 0x3d75_70a3, 0x3d7b_3333, 0x3d80_7ae2, 0x3d83_5c2a, 0x3d86_3d71, 0x3d89_1eb8,
    0x3d8c_0000, 0x3d8e_e148, 0x3d91_c290, 0x3d94_a3d7, 0x3d97_851f, 0x3d9a_6667, 0x3d9d_47af, 0x3da0_28f6,
    0x3da3_0a3e, 0x3da5_eb85, 0x3da8_cccd, 0x3dab_ae15, 0x3dae_8f5c, 0x3db1_70a4, 0x3db4_51eb, 0x3db7_3333,
    0x3dba_147b, 0x3dbc_f5c3, 0x3dbf_d70b, 0x3dc2_b852, 0x3dc5_999a, 0x3dc8_7ae2, 0x3dcb_5c29, 0x3dd4_0000,
    0x3de2_6666, 0x3df0_cccd, 0x3dff_3333, 0x3e06_cccc, 0x3e0e_0000, 0x3e15_3334, 0x3e1c_6666, 0x3e23_999a,
    0x3e2a_cccc, 0x3e32_0000, 0x3e39_3334, 0x3e40_6666, 0x3e47_999a, 0x3e4e_cccc, 0x3e56_0000, 0x3e5d_3334,
    0x3e64_6666, 0x3e6b_999a, 0x3e72_cccc, 0x3e7a_0000, 0x3e80_9999, 0x3e84_3333, 0x3e87_cccd, 0x3e8b_6666,
    0x3e8f_0000, 0x3e92_999a, 0x3e96_3333, 0x3e99_cccc, 0x3e9d_6666, 0x3ea1_0000, 0x3ea4_999a, 0x3ea8_3333,
    0x3eab_cccc, 0x3eaf_6666, 0x3eb3_0000, 0x3eb6_999a, 0x3eba_3333, 0x3ebd_cccc, 0x3ec1_6666, 0x3ec5_0000,
    0x3ec8_999a, 0x3ecc_3333, 0x3ecf_cccc, 0x3ed3_6666, 0x3ed7_0000, 0x3eda_999a, 0x3ede_3333, 0x3ee1_cccc,
    0x3ee5_6666, 0x3ee9_0000, 0x3eec_999a, 0x3ef0_3333, 0x3ef3_cccc, 0x3ef7_6666, 0x3efb_0000, 0x3efe_9999,
    0x3f01_199a, 0x3f02_e666, 0x3f04_b333, 0x3f06_8000, 0x3f08_4ccc, 0x3f0a_199a, 0x3f0b_e666, 0x3f0d_b334,
    0x3f0f_8000, 0x3f11_4ccd, 0x3f13_199a, 0x3f14_e666, 0x3f16_b334, 0x3f18_8000, 0x3f1a_4ccd, 0x3f1c_199a,
    0x3f1d_e666, 0x3f1f_b334, 0x3f21_8000, 0x3f23_4ccd, 0x3f25_199a, 0x3f26_e666, 0x3f28_b334, 0x3f2a_8000,
    0x3f2c_4ccd, 0x3f2e_199a, 0x3f2f_e666, 0x3f31_b334, 0x3f33_8000, 0x3f35_4ccd, 0x3f37_199a, 0x3f38_e666,
    0x3f3a_b334, 0x3f3c_8000, 0x3f3e_4ccd, 0x3f40_199a, 0x3f41_e666, 0x3f43_b334, 0x3f45_8000, 0x3f47_4ccc,
    0x3f49_199a, 0x3f4a_e666, 0x3f4c_b334, 0x3f4e_8000, 0x3f50_4ccc, 0x3f52_199a, 0x3f53_e666, 0x3f55_b334,
    0x3f57_8000, 0x3f59_4ccc, 0x3f5b_199a, 0x3f5c_e666, 0x3f5e_b334, 0x3f60_8000, 0x3f62_4ccc, 0x3f64_199a,
    0x3f65_e666, 0x3f67_b334, 0x3f69_8000, 0x3f6b_4ccc, 0x3f6d_199a, 0x3f6e_e666, 0x3f70_b334, 0x3f72_8000,
    0x3f74_4ccc, 0x3f76_199a, 0x3f77_e666, 0x3f79_b334, 0x3f7b_8000, 0x3f7d_4ccc, 0x3f7f_199a, 0x3f80_0000,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_the_rounded_midpoints() {
        for k in 0..15 {
            assert_eq!(NF4_THRESHOLDS[k], (NF4[k] + NF4[k + 1]) / 2.0, "between {k} and {}", k + 1);
        }
        let fp4 = FP4_ORDER.map(|code| FP4[usize::from(code)]);
        for k in 0..15 {
            assert_eq!(FP4_THRESHOLDS[k], (fp4[k] + fp4[k + 1]) / 2.0, "between {k} and {}", k + 1);
        }
        assert_eq!(NF4[1].to_bits(), 0xbf32_39b1);
        assert_eq!(NF4[8].to_bits(), 0x3da2_faff);
        assert_eq!(NF4[14].to_bits(), 0x3f39_13b3);
    }

    #[test]
    fn the_dynamic_map_ascends_between_its_published_ends() {
        let map = dynamic_map();
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((map[0], map[127], map[255]), (-0.992_968_74, 0.0, 1.0));
        let map = unsigned_dynamic_map();
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((map[0], map[1], map[255]), (0.0, 3.250_000_3e-7, 1.0));
    }
}
