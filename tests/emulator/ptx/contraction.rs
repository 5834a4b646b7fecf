//! A `mul` and the `add` or `sub` of its product, which the assembler may make one `fma` where neither
//! says how to round: PTX ISA, `mul`. It decides; here every pair is one, as in the sources none is.

use std::collections::HashMap;

use super::operands::Instruction;

/// The products that are still what they were, with their factors, since the last label.
#[derive(Default)]
pub struct Products(HashMap<String, [String; 2]>);

impl Products {
    /// Takes note of an instruction, which may be guarded. Returns the `fma` that may take its place.
    pub fn pass(&mut self, instruction: &Instruction, is_guarded: bool) -> Option<String> {
        let fused = self.fused(instruction);
        for register in registers(instruction.operands.first().unwrap_or(&"")) {
            self.0.retain(|product, factors| {
                product != register && !factors.iter().any(|factor| factor == register)
            });
        }
        if instruction.parts == ["mul", "f32"] && !is_guarded {
            let [product, a, b] = [0, 1, 2].map(|i| instruction.operands[i].to_string());
            if product != a && product != b {
                self.0.insert(product, [a, b]);
            }
        }
        fused
    }

    /// Code from elsewhere may come in.
    pub fn label(&mut self) {
        self.0.clear();
    }

    fn fused(&self, instruction: &Instruction) -> Option<String> {
        let sum = instruction.parts == ["add", "f32"];
        if !sum && instruction.parts != ["sub", "f32"] {
            return None;
        }
        let value = |operand: &str| instruction.value(operand, "f32");
        let [first, second] = [1, 2].map(|i| instruction.operands[i]);
        let (product, other, first_is_product) = match (self.0.get(first), self.0.get(second)) {
            (Some(product), _) => (product, second, true),
            (None, Some(product)) => (product, first, false),
            (None, None) => return None,
        };
        let (a, b, c) = (value(&product[0])?, value(&product[1])?, value(other)?);
        let [sign, other_sign] = match (sum, first_is_product) {
            (true, _) => ["", ""],
            (false, true) => ["", "-"],
            (false, false) => ["-", ""],
        };
        instruction.put(&format!("std::fma({sign}{a}, {b}, {other_sign}{c})"))
    }
}

/// Those that an operand names: one, several in braces, or two with a bar.
fn registers(operand: &str) -> impl Iterator<Item = &str> {
    operand
        .split(|c: char| !(c == '%' || c.is_ascii_alphanumeric() || c == '_'))
        .filter(|name| name.starts_with('%'))
}

#[cfg(test)]
mod tests {
    use super::super::Arrays;
    use super::*;

    fn fused(lines: &[&str]) -> Vec<bool> {
        let (shared, mut products) = (Arrays::default(), Products::default());
        let pass = |line: &&str| match line.strip_suffix(':') {
            Some(_) => {
                products.label();
                false
            }
            None => products.pass(&Instruction::read(1, line, &shared), false).is_some(),
        };
        lines.iter().map(pass).collect()
    }

    #[test]
    fn a_product_is_fused_into_a_sum_that_does_not_say_how_to_round() {
        let product = "mul.f32 %f1, %f2, %f3";
        let last = |lines: &[&str]| *fused(lines).last().unwrap();
        for sum in ["add.f32 %f4, %f1, %f5", "add.f32 %f4, %f5, %f1", "sub.f32 %f4, %f5, %f1"] {
            assert!(last(&[product, sum]), "{sum}");
            assert!(last(&[product, "add.f32 %f1, %f1, %f5", product, sum]), "{sum}");
            assert!(!last(&["mul.rn.f32 %f1, %f2, %f3", sum]), "{sum}");
            assert!(!last(&[product, "$L__BB0_1:", sum]), "{sum}");
            for change in ["mov.f32 %f1, %f9", "mov.f32 %f2, %f9", "ld.v2.f32 {%f8, %f3}, [%rd1]"] {
                assert!(!last(&[product, change, sum]), "{change}");
            }
        }
        assert!(!last(&[product, "add.rn.f32 %f4, %f1, %f5"]));
        assert!(!last(&["mul.f32 %f1, %f1, %f3", "add.f32 %f4, %f1, %f5"]));
    }
}
