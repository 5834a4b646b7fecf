//! From PTX to C++: every kernel of kernels.ptx as a function over ptx.hpp, an instruction a line.
//!
//! What the source's emulation cannot show is shown by this: what NVRTC made of the sources, the
//! registers of each line of inline PTX, the parameters as a launch must pass them. It knows the
//! instructions that the file has; any other is an error with its line.

mod contraction;
mod instructions;
mod operands;

use std::collections::HashMap;
use std::fmt::Write;

use contraction::Products;
use operands::Instruction;

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
    format!("kernels.ptx:{number}: `{line}` is not known to tests/emulator/ptx/")
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
            let fixed = self.bytes.next_multiple_of(128);
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
    products: Products,
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
        let products = Products::default();
        let mut kernel = Kernel { name, largest_block, signature, body, shared, products };
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
            self.products.label();
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
            let instruction = Instruction::read(number, rest, &self.shared);
            let fused = self.products.pass(&instruction, guard.is_some());
            let code = fused.or_else(|| instruction.code())?;
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
