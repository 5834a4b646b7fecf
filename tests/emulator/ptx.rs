//! From PTX to C++: every kernel of kernels.ptx as a function over ptx.hpp, an instruction a line.
//!
//! What the source's emulation cannot show is shown by this: what NVRTC made of the sources, the
//! registers of each line of inline PTX, the parameters as a launch must pass them. It knows the
//! instructions that the file has; any other is an error with its line.

use std::collections::HashMap;
use std::fmt::Write;

/// C++ for all entries of `ptx`, and a table `KERNELS` of them.
pub fn translate(ptx: &str) -> Result<String, String> {
    let mut lines = ptx.lines().enumerate().map(|(i, line)| (i + 1, statement(line)));
    let mut module = Arrays::default();
    let mut out = String::from("// Translated from kernels.ptx.\n#include \"ptx.hpp\"\n");
    let mut table = String::new();
    while let Some((number, line)) = lines.next() {
        if let Some(name) = line.strip_prefix(".visible .entry ") {
            let kernel = Kernel::read(name, &mut lines, module.clone())?;
            out.push_str(&kernel.body);
            let Kernel { name, largest_block, signature, .. } = kernel;
            writeln!(table, "    {{\"{name}\", {largest_block}, \"{signature}\", {name}}},")
                .unwrap();
        } else if line.contains(".shared ") {
            module.declare(line).ok_or_else(|| unknown(number, line))?;
        } else if !(line.is_empty() || line.starts_with('.')) {
            return Err(unknown(number, line));
        }
    }
    write!(out, "const emulator::Kernel KERNELS[] = {{\n{table}}};\n").unwrap();
    Ok(out)
}

fn unknown(number: usize, line: &str) -> String {
    format!("kernels.ptx:{number}: `{line}` is not known to tests/emulator/ptx.rs")
}

/// A line without its comment, spaces and semicolon.
fn statement(line: &str) -> &str {
    let line = line.split("//").next().unwrap_or_default().trim();
    line.strip_suffix(';').unwrap_or(line).trim()
}

/// The arrays of shared memory: their offsets, in the order of declaration.
#[derive(Default, Clone)]
struct Arrays {
    offsets: HashMap<String, usize>,
    bytes: usize,
    dynamic: Option<String>,
}

impl Arrays {
    /// `.shared .align 16 .b8 name[128]`, or with `.extern` and no length.
    fn declare(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let align: usize =
            words[words.iter().position(|word| *word == ".align")? + 1].parse().ok()?;
        let (name, bytes) = words.last()?.strip_suffix(']')?.split_once('[')?;
        if bytes.is_empty() {
            self.dynamic = Some(name.into());
        } else {
            let start = self.bytes.next_multiple_of(align);
            self.offsets.insert(name.into(), start);
            self.bytes = start + bytes.parse::<usize>().ok()?;
        }
        Some(())
    }

    /// The address of `name`.
    fn address(&self, name: &str) -> Option<String> {
        if self.dynamic.as_deref() == Some(name) {
            let fixed = self.bytes.next_multiple_of(16);
            return Some(format!("(ptx::SHARED_BASE + {fixed})"));
        }
        self.offsets.get(name).map(|offset| format!("(ptx::SHARED_BASE + {offset})"))
    }
}

struct Kernel {
    name: String,
    largest_block: u32,
    /// A letter a parameter, as in emulator.cpp; an address is like any 8-byte integer.
    signature: String,
    body: String,
    shared: Arrays,
}

impl Kernel {
    /// What follows `.visible .entry `, to the closing brace.
    fn read<'a>(
        name: &str,
        lines: &mut impl Iterator<Item = (usize, &'a str)>,
        shared: Arrays,
    ) -> Result<Self, String> {
        let name = name.trim_end_matches(['(', ')']).to_string();
        let (largest_block, signature, body) = (0, String::new(), String::new());
        let mut kernel = Kernel { name, largest_block, signature, body, shared };
        writeln!(kernel.body, "static void {}(void** arguments) {{", kernel.name).unwrap();
        for (number, line) in lines {
            match line {
                "" | "(" | ")" | "{" => {}
                "}" => {
                    if kernel.largest_block == 0 {
                        return Err(format!("kernels.ptx:{number}: no .maxntid"));
                    }
                    kernel.body.push_str("}\n");
                    return Ok(kernel);
                }
                _ => kernel.line(number, line).ok_or_else(|| unknown(number, line))?,
            }
        }
        Err(format!("kernels.ptx: {} does not end", kernel.name))
    }

    /// One line; `None` if it means nothing known.
    fn line(&mut self, number: usize, line: &str) -> Option<()> {
        if let Some(label) = line.strip_suffix(':') {
            writeln!(self.body, "{}:;", label_name(label)).unwrap();
        } else if line.starts_with('.') {
            self.directive(line)?;
        } else {
            let (guard, rest) = match line.strip_prefix('@') {
                None => (None, line),
                Some(guarded) => {
                    let (guard, rest) = guarded.split_once(char::is_whitespace)?;
                    (Some(guard.replace('%', "")), rest.trim())
                }
            };
            let instruction = Instruction::read(number, rest, &self.shared)?;
            let code = instruction.code(&mut self.shared)?;
            match guard {
                Some(guard) => writeln!(self.body, "if ({guard}) {{ {code} }}").unwrap(),
                None => writeln!(self.body, "{code}").unwrap(),
            }
        }
        Some(())
    }

    fn directive(&mut self, line: &str) -> Option<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            ".param" => self.signature.push(match words[1] {
                ".u64" => 'l',
                ".u32" => 'i',
                ".f32" => 'f',
                ".f64" => 'd',
                _ => return None,
            }),
            ".maxntid" => {
                let sizes = line.trim_start_matches(".maxntid").split(',');
                let sizes: Option<Vec<u32>> = sizes.map(|size| size.trim().parse().ok()).collect();
                self.largest_block = sizes?.iter().product();
            }
            ".minnctapersm" | ".pragma" => {}
            ".shared" | ".extern" => self.shared.declare(line)?,
            ".reg" => {
                let (name, count) =
                    words[2].strip_prefix('%')?.strip_suffix('>')?.split_once('<')?;
                let count: usize = count.parse().ok()?;
                let kind = match words[1] {
                    ".pred" => "bool",
                    ".b16" => "ptx::u16",
                    ".b32" => "ptx::u32",
                    ".b64" => "ptx::u64",
                    ".f32" => "float",
                    ".f64" => "double",
                    _ => return None,
                };
                for i in 1..count {
                    write!(self.body, "{kind} {name}{i}; ").unwrap();
                }
                self.body.push('\n');
            }
            _ => return None,
        }
        Some(())
    }
}

fn label_name(label: &str) -> String {
    label.replace('$', "")
}

/// `opcode operand, operand`.
struct Instruction<'a> {
    number: usize,
    /// The opcode at its dots.
    parts: Vec<&'a str>,
    operands: Vec<&'a str>,
    /// What names of shared arrays stand for.
    names: HashMap<&'a str, String>,
}

impl<'a> Instruction<'a> {
    fn read(number: usize, line: &'a str, shared: &Arrays) -> Option<Self> {
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
        let mut names = HashMap::new();
        for operand in &operands {
            let name = operand.trim_matches(['[', ']']).split('+').next()?;
            if let Some(address) = shared.address(name) {
                names.insert(name, address);
            }
        }
        Some(Instruction { number, parts, operands, names })
    }

    /// The last part of the opcode, but for a number of parts at its end.
    fn kind(&self) -> &'a str {
        self.parts[self.parts.len() - 1]
    }

    fn has(&self, part: &str) -> bool {
        self.parts.contains(&part)
    }

    /// An operand as it stands in an instruction: a register's bits, or a constant.
    fn raw(&self, operand: &str) -> Option<String> {
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
        self.names.get(operand).cloned()
    }

    /// Operand `index`, read as `kind`.
    fn read_as(&self, index: usize, kind: &str) -> Option<String> {
        let raw = self.raw(self.operands.get(index)?)?;
        Some(match kind {
            "pred" => raw,
            "b16" | "b32" | "b64" => format!("ptx::as<ptx::{}>({raw})", kind.replace('b', "u")),
            _ => format!("ptx::as<ptx::{kind}>({raw})"),
        })
    }

    /// `register = value;` for operand 0.
    fn put(&self, value: &str) -> Option<String> {
        let to = self.raw(self.operands[0])?;
        Some(format!("ptx::put({to}, {value});"))
    }

    /// The registers of `{%a, %b}`, or the one of `%a`.
    fn group(&self, index: usize) -> Option<Vec<String>> {
        let operand = self.operands.get(index)?;
        let inner = operand.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        inner.unwrap_or(operand).split(',').map(|part| self.raw(part.trim())).collect()
    }

    /// `[%a+4]`: the sum.
    fn address(&self, index: usize) -> Option<String> {
        let inner = self.operands.get(index)?.strip_prefix('[')?.strip_suffix(']')?;
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        let offset: i64 = offset.parse().ok()?;
        Some(format!("ptx::u64({}) + ptx::u64({offset}ll)", self.raw(base)?))
    }

    /// Where [`Self::address`] lies.
    fn place(&self, index: usize, bytes: usize, written: bool, fixed: usize) -> Option<String> {
        let (address, number) = (self.address(index)?, self.number);
        Some(if self.has("shared") {
            format!("ptx::shared({address}, {bytes}, {fixed}, {number})")
        } else {
            format!("ptx::global({address}, {bytes}, {written}, {number})")
        })
    }

    /// C++ of two operands.
    fn binary(&self, kind: &str, expression: &str) -> Option<String> {
        let (a, b) = (self.read_as(1, kind)?, self.read_as(2, kind)?);
        self.put(&expression.replace("$a", &a).replace("$b", &b))
    }

    fn code(&self, shared: &mut Arrays) -> Option<String> {
        let (kind, number) = (self.kind(), self.number);
        let is_float = matches!(kind, "f32" | "f64");
        // What rounds, saturates or flushes is named where it is known.
        let modifiers: Vec<&str> = match self.parts.as_slice() {
            [_, middle @ .., _] => middle.to_vec(),
            _ => Vec::new(),
        };
        let rounds_to_nearest = modifiers.is_empty() || modifiers == ["rn"];
        match self.parts[0] {
            "ret" => Some("return;".into()),
            "bra" => Some(format!("goto {};", label_name(self.operands[0]))),
            "mov" => self.mov(kind),
            "cvta" if self.parts == ["cvta", "to", "global", "u64"] => {
                self.put(&self.read_as(1, "u64")?)
            }
            "ld" if self.has("param") => {
                let name = self.operands[1].strip_prefix('[')?.strip_suffix(']')?;
                let index = name.rsplit_once("_param_")?.1;
                self.put(&format!("ptx::argument<ptx::{kind}>(arguments, {index})"))
            }
            "ld" => {
                let registers = self.group(0)?;
                let size = bytes(kind)?;
                let place = self.place(1, size * registers.len(), false, shared.bytes)?;
                let mut code = format!("{{ const char* at = {place}; ");
                for (i, register) in registers.iter().enumerate() {
                    let from = size * i;
                    write!(code, "ptx::put({register}, ptx::load<ptx::{kind}>(at + {from})); ")
                        .unwrap();
                }
                Some(code + "}")
            }
            "st" => {
                let registers = self.group(1)?;
                let size = bytes(kind)?;
                let place = self.place(0, size * registers.len(), true, shared.bytes)?;
                let mut code = format!("{{ char* at = {place}; ");
                for (i, register) in registers.iter().enumerate() {
                    let to = size * i;
                    write!(code, "ptx::store(at + {to}, ptx::as<ptx::{kind}>({register})); ")
                        .unwrap();
                }
                Some(code + "}")
            }
            "atom" if self.parts == ["atom", "global", "or", "b32"] => {
                let (address, bits) = (self.address(1)?, self.read_as(2, "u32")?);
                self.put(&format!("ptx::atomic_or({address}, {bits}, {number})"))
            }
            "add" | "sub" | "mul" if is_float && rounds_to_nearest => {
                let sign = match self.parts[0] {
                    "add" => '+',
                    "sub" => '-',
                    _ => '*',
                };
                self.binary(kind, &format!("$a {sign} $b"))
            }
            "add" if modifiers.is_empty() => self.binary(kind, "ptx::sum($a, $b)"),
            "sub" if modifiers.is_empty() => self.binary(kind, "ptx::difference($a, $b)"),
            "mul" if modifiers == ["lo"] => self.binary(kind, "ptx::product($a, $b)"),
            "mul" if modifiers == ["wide"] => {
                let wide = kind.replace("32", "64");
                self.binary(kind, &format!("ptx::product(ptx::{wide}($a), ptx::{wide}($b))"))
            }
            "mad" if modifiers == ["lo"] => {
                let c = self.read_as(3, kind)?;
                self.binary(kind, &format!("ptx::sum(ptx::product($a, $b), {c})"))
            }
            "fma" if is_float => {
                let c = self.read_as(3, kind)?;
                match modifiers.as_slice() {
                    ["rn"] => self.binary(kind, &format!("std::fma($a, $b, {c})")),
                    ["rm"] if kind == "f32" => {
                        self.binary(kind, &format!("ptx::fma_down($a, $b, {c})"))
                    }
                    _ => None,
                }
            }
            "div" if is_float && modifiers == ["rn"] => self.binary(kind, "$a / $b"),
            "div" if kind == "f32" && modifiers == ["approx"] => {
                self.binary(kind, "ptx::quotient_approximate($a, $b)")
            }
            "div" if modifiers.is_empty() => {
                self.binary(kind, &format!("ptx::quotient($a, $b, {number})"))
            }
            "rem" if modifiers.is_empty() => {
                self.binary(kind, &format!("ptx::remainder($a, $b, {number})"))
            }
            "max" if is_float && modifiers.is_empty() => self.binary(kind, "ptx::larger($a, $b)"),
            "min" if is_float && modifiers.is_empty() => self.binary(kind, "ptx::smaller($a, $b)"),
            "max" if modifiers.is_empty() => self.binary(kind, "std::max($a, $b)"),
            "min" if modifiers.is_empty() => self.binary(kind, "std::min($a, $b)"),
            "abs" if is_float => self.put(&format!("std::fabs({})", self.read_as(1, kind)?)),
            "neg" if is_float => self.put(&format!("-{}", self.read_as(1, kind)?)),
            "neg" => {
                self.put(&format!("ptx::difference(ptx::{kind}(0), {})", self.read_as(1, kind)?))
            }
            "sqrt" if modifiers == ["rn"] => {
                self.put(&format!("std::sqrt({})", self.read_as(1, kind)?))
            }
            "rcp" if modifiers == ["rn"] => {
                self.put(&format!("ptx::{kind}(1) / {}", self.read_as(1, kind)?))
            }
            "rcp" if modifiers == ["approx", "ftz"] && kind == "f32" => {
                self.put(&format!("ptx::reciprocal_approximate({})", self.read_as(1, kind)?))
            }
            "ex2" if modifiers == ["approx", "ftz"] && kind == "f32" => {
                self.put(&format!("ptx::exp2_approximate({})", self.read_as(1, kind)?))
            }
            "and" | "or" | "xor" if kind == "pred" => {
                let sign = sign_of(self.parts[0]);
                let (to, a, b) = (
                    self.raw(self.operands[0])?,
                    self.raw(self.operands[1])?,
                    self.raw(self.operands[2])?,
                );
                Some(format!("{to} = {a} {sign} {b};"))
            }
            "and" | "or" | "xor" => {
                let unsigned = format!("ptx::{}", kind.replace('b', "u"));
                self.binary(kind, &format!("{unsigned}($a {} $b)", sign_of(self.parts[0])))
            }
            "not" if kind == "pred" => {
                Some(format!("{} = !{};", self.raw(self.operands[0])?, self.raw(self.operands[1])?))
            }
            "not" => {
                let unsigned = format!("ptx::{}", kind.replace('b', "u"));
                self.put(&format!("{unsigned}(~{})", self.read_as(1, kind)?))
            }
            "shl" | "shr" => {
                let by = self.read_as(2, "u32")?;
                let function = if self.parts[0] == "shl" { "shift_left" } else { "shift_right" };
                self.put(&format!("ptx::{function}({}, {by})", self.read_as(1, kind)?))
            }
            "prmt" if kind == "b32" => {
                let selector = self.read_as(3, "u32")?;
                self.binary(kind, &format!("ptx::permute($a, $b, {selector}, {number})"))
            }
            "selp" => {
                let condition = self.raw(self.operands[3])?;
                self.binary(kind, &format!("({condition} ? $a : $b)"))
            }
            "setp" => self.setp(kind),
            "cvt" => self.cvt(),
            "bar" if self.parts == ["bar", "sync"] && self.operands == ["0"] => {
                Some(format!("ptx::barrier({number});"))
            }
            "bar" if self.parts == ["bar", "warp", "sync"] => {
                Some(format!("ptx::warp_barrier({}, {number});", self.read_as(0, "u32")?))
            }
            "shfl" => {
                let function = match self.parts.as_slice() {
                    ["shfl", "sync", "bfly", "b32"] => "shuffle_xor",
                    ["shfl", "sync", "idx", "b32"] => "shuffle_index",
                    _ => return None,
                };
                // The predicate, whether the source was in range, is always true: segments are refused.
                let (to, inside) = self.operands[0].split_once('|')?;
                let (to, inside) = (self.raw(to)?, self.raw(inside)?);
                let values: Option<Vec<String>> = (1..5).map(|i| self.read_as(i, "u32")).collect();
                Some(format!(
                    "{to} = ptx::{function}({}, {number}); {inside} = true;",
                    values?.join(", ")
                ))
            }
            "ldmatrix" => {
                let transposed = match &self.parts[1..] {
                    ["sync", "aligned", "m8n8", "x4", "shared", "b16"] => false,
                    ["sync", "aligned", "m8n8", "x4", "trans", "shared", "b16"] => true,
                    _ => return None,
                };
                let (to, address) = (self.group(0)?, self.address(1)?);
                let mut code = format!(
                    "{{ const auto m = ptx::load_matrices(ptx::u32({address}), {transposed}, {}, {number}); ",
                    shared.bytes
                );
                for (i, register) in to.iter().enumerate() {
                    write!(code, "{register} = m.words[{i}]; ").unwrap();
                }
                (to.len() == 4).then_some(code + "}")
            }
            "mma"
                if self.parts[1..]
                    == [
                        "sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32",
                    ] =>
            {
                let (d, a, b, c) = (self.group(0)?, self.group(1)?, self.group(2)?, self.group(3)?);
                if [d.len(), a.len(), b.len(), c.len()] != [4, 4, 2, 4] {
                    return None;
                }
                let mut code = format!(
                    "{{ const ptx::u32 b[2] = {{{}}}; const auto d = ptx::multiply_matrices({{{{{}}}}}, b, {{{{{}}}}}, {number}); ",
                    b.join(", "),
                    a.join(", "),
                    c.join(", ")
                );
                for (i, register) in d.iter().enumerate() {
                    write!(code, "{register} = d.elements[{i}]; ").unwrap();
                }
                Some(code + "}")
            }
            "cp" => match &self.parts[1..] {
                ["async", "cg" | "ca", "shared", "global"] => {
                    let (to, from, size) =
                        (self.address(0)?, self.address(1)?, self.operands.get(2)?);
                    let present = self.read_as(3, "u32")?;
                    // .cg copies 16 bytes, .ca also fewer.
                    if self.has("cg") && *size != "16" {
                        return None;
                    }
                    Some(format!(
                        "ptx::copy_async(ptx::u32({to}), {from}, {size}, {present}, {}, {number});",
                        shared.bytes
                    ))
                }
                ["async", "commit_group"] => Some("emulator::end_group_of_copies();".into()),
                ["async", "wait_group"] => {
                    Some(format!("emulator::wait_for_copies({});", self.operands[0]))
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn mov(&self, kind: &str) -> Option<String> {
        let (to, from) = (self.group(0)?, self.group(1)?);
        let half = match kind {
            "b32" => "u16",
            "b64" => "u32",
            _ => "",
        };
        match (to.as_slice(), from.as_slice()) {
            ([_], [_]) if kind == "pred" => Some(format!("{} = {};", to[0], from[0])),
            ([_], [_]) => self.put(&self.read_as(1, kind)?),
            ([low, high], [whole]) if !half.is_empty() => Some(format!(
                "{{ ptx::{half} halves[2]; static_assert(sizeof({whole}) == sizeof(halves), \"\"); memcpy(halves, &{whole}, sizeof(halves)); ptx::put({low}, halves[0]); ptx::put({high}, halves[1]); }}"
            )),
            ([whole], [low, high]) if !half.is_empty() => Some(format!(
                "{{ const ptx::{half} halves[2] = {{ptx::as<ptx::{half}>({low}), ptx::as<ptx::{half}>({high})}}; static_assert(sizeof({whole}) == sizeof(halves), \"\"); memcpy(&{whole}, halves, sizeof(halves)); }}"
            )),
            _ => None,
        }
    }

    /// A comparison; those that end in `u` hold where an operand is NaN, too.
    fn setp(&self, kind: &str) -> Option<String> {
        let [_, comparison, _] = self.parts.as_slice() else { return None };
        let is_float = matches!(kind, "f32" | "f64");
        let (ordered, unordered) = match comparison.strip_suffix('u') {
            Some(rest) if is_float && rest.len() == 2 => (rest, true),
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
        let (to, a, b) =
            (self.raw(self.operands[0])?, self.read_as(1, kind)?, self.read_as(2, kind)?);
        // In C++, NaN is unequal to all; in PTX, `ne` is ordered.
        let nan = format!("(std::isnan({a}) || std::isnan({b}))");
        Some(match (is_float, unordered, ordered) {
            (true, true, _) => format!("{to} = {nan} || {a} {sign} {b};"),
            (true, false, "ne") => format!("{to} = !{nan} && {a} != {b};"),
            _ => format!("{to} = {a} {sign} {b};"),
        })
    }

    fn cvt(&self) -> Option<String> {
        let [_, rounding @ .., to, from] = self.parts.as_slice() else { return None };
        let integer = |kind: &str| kind.starts_with(['u', 's']);
        let value = |kind| self.read_as(1, kind);
        match (rounding, *to, *from) {
            (["rn"], "bf16", "f32") => self.put(&format!("ptx::bf16_of({})", value("f32")?)),
            (["rn"], "bf16x2", "f32") => {
                let (upper, lower) = (value("f32")?, self.read_as(2, "f32")?);
                self.put(&format!("ptx::bf16x2_of({upper}, {lower})"))
            }
            ([], "f32", "f16") => self.put(&format!("ptx::f16_to_f32({})", value("u16")?)),
            (["sat"], "f32", "f32") => self.put(&format!("ptx::saturated({})", value("f32")?)),
            ([], "f64", "f32") | (["rn"], "f32", "f64") => {
                self.put(&format!("ptx::{to}({})", value(from)?))
            }
            (["rn"], "f32" | "f64", from) if integer(from) => {
                self.put(&format!("ptx::{to}({})", value(from)?))
            }
            ([], to, from) if integer(to) && integer(from) => {
                self.put(&format!("ptx::{to}({})", value(from)?))
            }
            _ => None,
        }
    }
}

fn sign_of(operation: &str) -> char {
    match operation {
        "and" => '&',
        "or" => '|',
        _ => '^',
    }
}

/// The size of a type.
fn bytes(kind: &str) -> Option<usize> {
    let bits: usize = kind.get(1..)?.parse().ok()?;
    Some(bits / 8)
}

#[test]
fn an_instruction_that_is_not_known_is_an_error_with_its_line() {
    let kernel = |line: &str| {
        format!(
            ".visible .entry k(\n.param .u64 k_param_0\n)\n.maxntid 32, 1, 1\n{{\n.reg .f32 %f<3>;\n{line}\nret;\n}}"
        )
    };
    assert!(translate(&kernel("add.rn.f32 %f1, %f1, %f2;")).is_ok());
    for line in
        ["add.rz.f32 %f1, %f1, %f2;", "tanh.approx.f32 %f1, %f2;", "ld.global.f32 %f1, [missing];"]
    {
        let error = translate(&kernel(line)).unwrap_err();
        assert!(error.starts_with("kernels.ptx:7: `"), "{error}");
    }
}
