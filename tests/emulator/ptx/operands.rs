//! An instruction in its parts, and its operands as C++.

use super::Arrays;

/// `opcode operand, operand`.
pub struct Instruction<'a> {
    /// Its line in the file.
    pub number: usize,
    /// The opcode at its dots.
    pub parts: Vec<&'a str>,
    pub operands: Vec<&'a str>,
    /// The kernel's.
    shared: &'a Arrays,
}

impl<'a> Instruction<'a> {
    pub fn read(number: usize, line: &'a str, shared: &'a Arrays) -> Self {
        let (opcode, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let parts = opcode.split('.').collect();
        let mut operands = Vec::new();
        let (mut depth, mut start) = (0, 0);
        for (i, c) in rest.char_indices() {
            match c {
                '{' | '[' => depth += 1,
                '}' | ']' => depth -= 1,
                ',' if depth == 0 => {
                    operands.push(rest[start..i].trim());
                    start = i + 1;
                }
                _ => {}
            }
        }
        if !rest.is_empty() {
            operands.push(rest[start..].trim());
        }
        Instruction { number, parts, operands, shared }
    }

    /// The bytes of the shared arrays, without what a launch adds.
    pub fn fixed(&self) -> usize {
        self.shared.bytes
    }

    /// The last part of the opcode: its type, where it has one.
    pub fn kind(&self) -> &'a str {
        self.parts[self.parts.len() - 1]
    }

    /// The parts between its name and its type.
    pub fn modifiers(&self) -> &[&'a str] {
        match self.parts.as_slice() {
            [_, modifiers @ .., _] => modifiers,
            _ => &[],
        }
    }

    pub fn has(&self, part: &str) -> bool {
        self.parts.contains(&part)
    }

    /// An operand as it stands in an instruction: a register's bits, or a constant.
    pub fn raw(&self, operand: &str) -> Option<String> {
        if let Some(register) = operand.strip_prefix('%') {
            return Some(match register.split_once('.') {
                None => register.to_string(),
                Some((
                    special @ ("tid" | "ntid" | "ctaid" | "nctaid"),
                    axis @ ("x" | "y" | "z"),
                )) => {
                    format!("ptx::{special}().{axis}")
                }
                Some(_) => return None,
            });
        }
        if let Some(bits) = operand.strip_prefix("0f") {
            return Some(format!("ptx::f32_of(0x{bits}u)"));
        }
        if let Some(bits) = operand.strip_prefix("0d") {
            return Some(format!("ptx::f64_of(0x{bits}ull)"));
        }
        if let Ok(number) = operand.parse::<i128>() {
            // 0 − 2^63 has no literal in C++.
            let bits =
                u64::try_from(number).ok().or_else(|| i64::try_from(number).ok().map(|x| x as u64));
            return Some(format!("ptx::u64({}ull)", bits?));
        }
        self.shared.address(operand)
    }

    /// Operand `index`, read as `kind`.
    pub fn read_as(&self, index: usize, kind: &str) -> Option<String> {
        self.value(self.operands.get(index)?, kind)
    }

    /// An operand, of this or another instruction, read as `kind`.
    pub fn value(&self, operand: &str, kind: &str) -> Option<String> {
        let raw = self.raw(operand)?;
        Some(match kind {
            "pred" => raw,
            "b16" | "b32" | "b64" => format!("ptx::as<ptx::{}>({raw})", kind.replace('b', "u")),
            _ => format!("ptx::as<ptx::{kind}>({raw})"),
        })
    }

    /// `register = value;` for operand 0.
    pub fn put(&self, value: &str) -> Option<String> {
        let to = self.raw(self.operands[0])?;
        Some(format!("ptx::put({to}, {value});"))
    }

    /// The registers of `{%a, %b}`, or the one of `%a`.
    pub fn group(&self, index: usize) -> Option<Vec<String>> {
        let operand = self.operands.get(index)?;
        let inner = operand.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        inner.unwrap_or(operand).split(',').map(|part| self.raw(part.trim())).collect()
    }

    /// `[%a+4]`: the sum.
    pub fn address(&self, index: usize) -> Option<String> {
        let inner = self.operands.get(index)?.strip_prefix('[')?.strip_suffix(']')?;
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        let offset: i64 = offset.parse().ok()?;
        Some(format!("ptx::u64({}) + ptx::u64({offset}ll)", self.raw(base)?))
    }

    /// Where [`Self::address`] lies.
    pub fn place(&self, index: usize, bytes: usize, written: bool) -> Option<String> {
        let (address, fixed, number) = (self.address(index)?, self.fixed(), self.number);
        Some(if self.has("shared") {
            let access = if written { "Write" } else { "Read" };
            format!("ptx::shared(ptx::Access::{access}, {address}, {bytes}, {fixed}, {number})")
        } else {
            format!("ptx::global({address}, {bytes}, {written}, {number})")
        })
    }

    /// `register = function(operand 1)`.
    pub fn unary(&self, function: &str) -> Option<String> {
        self.put(&format!("{function}({})", self.read_as(1, self.kind())?))
    }

    /// `register = expression`, where `$a` and `$b` are operands 1 and 2.
    pub fn binary(&self, expression: &str) -> Option<String> {
        let (a, b) = (self.read_as(1, self.kind())?, self.read_as(2, self.kind())?);
        self.put(&expression.replace("$a", &a).replace("$b", &b))
    }
}
