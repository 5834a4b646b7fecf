//! Numbers with a fraction as Python writes them.
//!
//! Source: CPython's `float.__repr__` (`Python/pystrtod.c`, format `r`): the fewest digits that give the
//! number back, with an exponent below 1e-4 and from 1e16 on.

/// Python's `repr(number)`.
pub(super) fn repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return (if number > 0.0 { "inf" } else { "-inf" }).into();
    }
    // Both write the fewest digits; only where the point stands is another.
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("it was asked for an exponent");
    let exponent: i32 = exponent.parse().expect("an exponent is a number");
    match exponent {
        -4..16 => format!("{number:?}"),
        _ => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::repr;

    /// Bits and texts: `struct.pack("<d", x)` and `repr(x)` of Python 3.
    #[rustfmt::skip]
    const PYTHONS: [(u64, &str); 44] = [
        (0x0000000000000000, "0.0"), (0x8000000000000000, "-0.0"),
        (0x3ff0000000000000, "1.0"), (0x3fb999999999999a, "0.1"),
        (0x4004000000000000, "2.5"), (0x4059000000000000, "100.0"),
        (0x430c6bf526340000, "1000000000000000.0"), (0x4341c37937e08000, "1e+16"),
        (0x4376345785d8a000, "1e+17"), (0x4341c37937e07fff, "9999999999999998.0"),
        (0x437b69b4ba630f35, "1.2345678901234568e+17"), (0x4345ee2a2eb5a5c4, "1.2345678901234568e+16"),
        (0x43118b54f22aeb03, "1234567890123456.8"), (0x430c6bf52633ffff, "999999999999999.9"),
        (0x4480f0cf064dd592, "1e+22"), (0x44b52d02c7e14af6, "1e+23"),
        (0x44dfe185ca57c517, "6.02214076e+23"), (0x54b249ad2594c37d, "1e+100"),
        (0x7fefffffffffffff, "1.7976931348623157e+308"), (0x3f50624dd2f1a9fc, "0.001"),
        (0x3f1a36e2eb1c432d, "0.0001"), (0x3f1cd5f99c38b04b, "0.00011"),
        (0x3ee4f8b588e368f1, "1e-05"), (0x3ef4f8b588e368f1, "2e-05"),
        (0x3eef75104d551d69, "1.5e-05"), (0x3f202e85be111841, "0.000123456789"),
        (0x3e7ad7f29abcaf48, "1e-07"), (0x3ddb7cdfd9d7bdbb, "1e-10"),
        (0x2b2bff2ee48e0530, "1e-100"), (0x0010000000000000, "2.2250738585072014e-308"),
        (0x0000000000000001, "5e-324"), (0x0000000000000003, "1.5e-323"),
        (0x000fffffffffffff, "2.225073858507201e-308"), (0x400921fb54442d18, "3.141592653589793"),
        (0xbe25798ee2308c3a, "-2.5e-09"), (0xc0fe240c9fbe76c9, "-123456.789"),
        (0x4330000000000000, "4503599627370496.0"), (0x4340000000000000, "9007199254740992.0"),
        (0x3fd3333333333334, "0.30000000000000004"), (0x3810000000000000, "1.1754943508222875e-38"),
        (0x4170000000000000, "16777216.0"), (0x444b1ae4d6e2ef50, "1e+21"),
        (0xc341c37937e08000, "-1e+16"), (0x4040aaaaaaaaaaab, "33.333333333333336"),
    ];

    #[test]
    fn numbers_are_written_as_by_python() {
        for (bits, expected) in PYTHONS {
            assert_eq!(repr(f64::from_bits(bits)), expected);
            assert_eq!(expected.parse::<f64>().unwrap().to_bits(), bits);
        }
        assert_eq!([f64::NAN, f64::INFINITY, -f64::INFINITY].map(repr), ["nan", "inf", "-inf"]);
    }
}
