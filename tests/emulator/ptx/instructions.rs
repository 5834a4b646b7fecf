//! The instructions that kernels.ptx has, each as a statement over ptx.hpp.

use std::fmt::Write;

use super::label_name;
use super::operands::Instruction;

impl Instruction<'_> {
    /// The statement; `None` if the instruction, or one of its modifiers, is not known.
    pub fn code(&self) -> Option<String> {
        match self.parts[0] {
            "ret" => Some("return;".into()),
            "bra" => Some(format!("goto {};", label_name(self.operands[0]))),
            "ld" | "st" | "cp" | "cvta" => self.memory(),
            "bar" | "shfl" | "ldmatrix" | "mma" => self.collective(),
            "mov" => self.mov(),
            "setp" => self.setp(),
            "selp" => {
                let condition = self.raw(self.operands[3])?;
                self.binary(&format!("({condition} ? $a : $b)"))
            }
            "cvt" => self.cvt(),
            "and" | "or" | "xor" | "not" | "shl" | "shr" | "prmt" | "bfi" => self.bits(),
            _ if matches!(self.kind(), "f32" | "f64") => self.float(),
            _ => self.integer(),
        }
    }

    fn memory(&self) -> Option<String> {
        let (kind, number, fixed) = (self.kind(), self.number, self.fixed());
        match self.parts.as_slice() {
            ["cvta", "to", "global", "u64"] => self.unary(""),
            ["ld", "param", _] => {
                let name = self.operands[1].strip_prefix('[')?.strip_suffix(']')?;
                let index = name.rsplit_once("_param_")?.1;
                self.put(&format!("ptx::argument<ptx::{kind}>(arguments, {index})"))
            }
            ["ld", ..] => self.access(0, 1, |register, byte| {
                format!("ptx::put({register}, ptx::load<ptx::{kind}>(at + {byte}));")
            }),
            ["st", ..] => self.access(1, 0, |register, byte| {
                format!("ptx::store(at + {byte}, ptx::as<ptx::{kind}>({register}));")
            }),
            // .cg copies 16 bytes, .ca fewer.
            ["cp", "async", cache @ ("cg" | "ca"), "shared", "global"] => {
                let (to, from, size) = (self.address(0)?, self.address(1)?, self.operands[2]);
                let present = self.read_as(3, "u32")?;
                let is_allowed = if *cache == "cg" { size == "16" } else { size == "4" };
                is_allowed.then(|| {
                    let to = format!("ptx::u32({to})");
                    format!("ptx::copy_async({to}, {from}, {size}, {present}, {fixed}, {number});")
                })
            }
            ["cp", "async", "commit_group"] => Some("emulator::end_group_of_copies();".into()),
            ["cp", "async", "wait_group"] => {
                Some(format!("ptx::wait_for_copies({});", self.operands[0]))
            }
            _ => None,
        }
    }

    /// A load or a store: `each` register of operand `registers`, with its byte behind `at`, which is
    /// operand `address`.
    fn access(
        &self,
        registers: usize,
        address: usize,
        each: impl Fn(&str, usize) -> String,
    ) -> Option<String> {
        let (space, width) = match self.modifiers() {
            [space @ .., "v2"] => (space, 2),
            [space @ .., "v4"] => (space, 4),
            space => (space, 1),
        };
        let (registers, size) = (self.group(registers)?, bytes(self.kind())?);
        if !matches!(space, [] | ["global"] | ["shared"]) || registers.len() != width {
            return None;
        }
        let place = self.place(address, size * width, self.parts[0] == "st")?;
        let mut code = format!("{{ auto* at = {place};");
        for (i, register) in registers.iter().enumerate() {
            write!(code, " {}", each(register, size * i)).unwrap();
        }
        Some(code + " }")
    }

    fn collective(&self) -> Option<String> {
        let (number, fixed) = (self.number, self.fixed());
        match self.parts.as_slice() {
            ["bar", "sync"] if self.operands == ["0"] => Some(format!("ptx::barrier({number});")),
            ["bar", "warp", "sync"] => {
                Some(format!("ptx::warp_barrier({}, {number});", self.read_as(0, "u32")?))
            }
            ["shfl", "sync", mode @ ("bfly" | "idx"), "b32"] => {
                // The predicate says that the source is in its segment; there are none.
                let (to, inside) = self.operands[0].split_once('|')?;
                let (to, inside) = (self.raw(to)?, self.raw(inside)?);
                let values: Option<Vec<String>> = (1..5).map(|i| self.read_as(i, "u32")).collect();
                let values = values?.join(", ");
                Some(format!("{to} = ptx::shuffle_{mode}({values}, {number}); {inside} = true;"))
            }
            ["ldmatrix", "sync", "aligned", "m8n8", "x4", order @ .., "shared", "b16"] => {
                let transposed = match order {
                    [] => false,
                    ["trans"] => true,
                    _ => return None,
                };
                let row = format!("ptx::u32({})", self.address(1)?);
                let words = format!("ptx::load_matrices({row}, {transposed}, {fixed}, {number})");
                take_apart(&self.group(0)?, &words, "words")
            }
            ["mma", "sync", "aligned", shape @ ..]
                if shape == ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"] =>
            {
                let (a, b, c) = (self.group(1)?, self.group(2)?, self.group(3)?);
                if [a.len(), b.len(), c.len()] != [4, 2, 4] {
                    return None;
                }
                let (a, b, c) = (a.join(", "), b.join(", "), c.join(", "));
                let sums = format!(
                    "ptx::multiply_matrices({{{{{a}}}}}, {{{{{b}}}}}, {{{{{c}}}}}, {number})"
                );
                take_apart(&self.group(0)?, &sums, "elements")
            }
            _ => None,
        }
    }

    fn mov(&self) -> Option<String> {
        let (to, from) = (self.group(0)?, self.group(1)?);
        match (to.as_slice(), from.as_slice(), self.kind()) {
            ([to], [from], "pred") => Some(format!("{to} = {from};")),
            ([_], [_], _) => self.unary(""),
            ([low, high], [whole], "b64") => Some(format!(
                "{{ const auto bits = ptx::as<ptx::u64>({whole}); \
                 ptx::put({low}, ptx::u32(bits)); ptx::put({high}, ptx::u32(bits >> 32)); }}"
            )),
            ([_], [low, high], "b64") => {
                let (low, high) =
                    (format!("ptx::as<ptx::u32>({low})"), format!("ptx::as<ptx::u32>({high})"));
                self.put(&format!("ptx::u64({high}) << 32 | {low}"))
            }
            ([_], [low, high], "b32") => {
                let (low, high) =
                    (format!("ptx::as<ptx::u16>({low})"), format!("ptx::as<ptx::u16>({high})"));
                self.put(&format!("ptx::u32({high}) << 16 | {low}"))
            }
            _ => None,
        }
    }

    /// A comparison; those that end in `u` hold where an operand is NaN, too.
    fn setp(&self) -> Option<String> {
        let (kind, [comparison]) = (self.kind(), self.modifiers()) else { return None };
        let is_float = matches!(kind, "f32" | "f64");
        let (ordered, unordered) = match comparison.strip_suffix('u') {
            Some(ordered) if is_float => (ordered, true),
            _ => (*comparison, false),
        };
        let sign = match ordered {
            "eq" => "==",
            "ne" => "!=",
            "lt" => "<",
            "le" => "<=",
            "gt" => ">",
            "ge" => ">=",
            _ => return None,
        };
        let to = self.raw(self.operands[0])?;
        let (a, b) = (self.read_as(1, kind)?, self.read_as(2, kind)?);
        let is_nan = format!("(std::isnan({a}) || std::isnan({b}))");
        Some(match (is_float, unordered) {
            (false, _) => format!("{to} = {a} {sign} {b};"),
            (true, false) => format!("{to} = !{is_nan} && {a} {sign} {b};"),
            (true, true) => format!("{to} = {is_nan} || {a} {sign} {b};"),
        })
    }

    fn cvt(&self) -> Option<String> {
        let [_, rounding @ .., to, from] = self.parts.as_slice() else { return None };
        let is_integer = |kind: &str| kind.starts_with(['u', 's']);
        let value = |kind| self.read_as(1, kind);
        match (rounding, *to, *from) {
            (["rn"], "bf16", "f32") => self.put(&format!("ptx::bf16_of({})", value("f32")?)),
            (["rn"], "bf16x2", "f32") => self.binary("ptx::bf16x2_of($a, $b)"),
            (["sat"], "f32", "f32") => self.unary("ptx::saturated"),
            ([], "f64", "f32") | (["rn"], "f32", "f64") => self.unary(&format!("ptx::{to}")),
            (["rn"], "f32" | "f64", from) if is_integer(from) => self.unary(&format!("ptx::{to}")),
            ([], to, from) if is_integer(to) && is_integer(from) => {
                self.unary(&format!("ptx::{to}"))
            }
            _ => None,
        }
    }

    fn bits(&self) -> Option<String> {
        let kind = self.kind();
        let sign = match self.parts[0] {
            "and" => '&',
            "or" => '|',
            _ => '^',
        };
        match (self.parts[0], self.modifiers()) {
            ("and" | "or" | "xor", []) if kind == "pred" => {
                let operands: Option<Vec<_>> = self.operands.iter().map(|x| self.raw(x)).collect();
                let operands = operands?;
                Some(format!("{} = {} {sign} {};", operands[0], operands[1], operands[2]))
            }
            ("not", []) if kind == "pred" => {
                Some(format!("{} = !{};", self.raw(self.operands[0])?, self.raw(self.operands[1])?))
            }
            ("and" | "or" | "xor", []) => self.binary(&format!("decltype($a)($a {sign} $b)")),
            ("not", []) => self.unary("ptx::inverse"),
            ("shl" | "shr", []) => {
                let (function, by) = (self.parts[0], self.read_as(2, "u32")?);
                self.put(&format!("ptx::{function}({}, {by})", self.read_as(1, kind)?))
            }
            ("prmt", []) => {
                let (selector, number) = (self.read_as(3, "u32")?, self.number);
                self.binary(&format!("ptx::permute($a, $b, {selector}, {number})"))
            }
            ("bfi", []) if kind == "b32" => {
                let (from, count) = (self.read_as(3, "u32")?, self.read_as(4, "u32")?);
                self.binary(&format!("ptx::insert($a, $b, {from}, {count})"))
            }
            _ => None,
        }
    }

    fn float(&self) -> Option<String> {
        let is_f32 = self.kind() == "f32";
        match (self.parts[0], self.modifiers()) {
            ("add", [] | ["rn"]) => self.binary("$a + $b"),
            ("sub", [] | ["rn"]) => self.binary("$a - $b"),
            ("mul", [] | ["rn"]) => self.binary("$a * $b"),
            ("div", ["rn"]) => self.binary("$a / $b"),
            ("div", ["approx"]) if is_f32 => self.binary("ptx::quotient_approximate($a, $b)"),
            ("fma", [rounding]) => {
                let function = match *rounding {
                    "rn" => "std::fma",
                    "rm" if is_f32 => "ptx::fma_down",
                    _ => return None,
                };
                let c = self.read_as(3, self.kind())?;
                self.binary(&format!("{function}($a, $b, {c})"))
            }
            ("max", []) => self.binary("ptx::larger($a, $b)"),
            ("min", []) => self.binary("ptx::smaller($a, $b)"),
            ("abs", []) => self.unary("std::fabs"),
            ("neg", []) => self.unary("-"),
            ("sqrt", ["rn"]) => self.unary("std::sqrt"),
            ("rcp", ["rn"]) => self.unary("1 / "),
            ("rcp", ["approx", "ftz"]) if is_f32 => self.unary("ptx::reciprocal_approximate"),
            ("ex2", ["approx", "ftz"]) if is_f32 => self.unary("ptx::exp2_approximate"),
            _ => None,
        }
    }

    fn integer(&self) -> Option<String> {
        let (kind, number) = (self.kind(), self.number);
        match (self.parts[0], self.modifiers()) {
            ("add", []) => self.binary("ptx::sum($a, $b)"),
            ("sub", []) => self.binary("ptx::difference($a, $b)"),
            ("mul", ["lo"]) => self.binary("ptx::product($a, $b)"),
            ("mul", ["wide"]) => {
                let wide = match kind {
                    "u32" => "u64",
                    "s32" => "s64",
                    _ => return None,
                };
                self.binary(&format!("ptx::product(ptx::{wide}($a), ptx::{wide}($b))"))
            }
            ("mad", ["lo"]) => {
                let c = self.read_as(3, kind)?;
                self.binary(&format!("ptx::sum(ptx::product($a, $b), {c})"))
            }
            ("div", []) => self.binary(&format!("ptx::quotient($a, $b, {number})")),
            ("rem", []) => self.binary(&format!("ptx::remainder($a, $b, {number})")),
            ("max", []) => self.binary("std::max($a, $b)"),
            ("min", []) => self.binary("std::min($a, $b)"),
            ("neg", []) => self.unary("ptx::negative"),
            _ => None,
        }
    }
}

/// The members of a value, each into a register.
fn take_apart(registers: &[String], value: &str, member: &str) -> Option<String> {
    let mut code = format!("{{ const auto all = {value}; ");
    for (i, register) in registers.iter().enumerate() {
        write!(code, "{register} = all.{member}[{i}]; ").unwrap();
    }
    (registers.len() == 4).then_some(code + "}")
}

/// The size of a type.
fn bytes(kind: &str) -> Option<usize> {
    let bits: usize = kind.get(1..)?.parse().ok()?;
    Some(bits / 8)
}
