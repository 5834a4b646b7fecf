//! `nibble doctor` and `--device` with the real binary, on machines with and without a GPU.

#[cfg(target_os = "linux")]
use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::Command;
use std::process::Output;

use serde_json::Value;

use crate::training::{self, json, stderr, stdout};

fn nibble(arguments: &[&str]) -> Output {
    training::nibble(env!("CARGO_MANIFEST_DIR"), arguments).output().unwrap()
}

/// What doctor finds.
fn findings() -> Value {
    json(&nibble(&["doctor", "--json"]))
}

/// As the standard library has it.
#[cfg(target_arch = "x86_64")]
fn widest_instructions() -> Option<&'static str> {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let widest = if is_x86_feature_detected!("avx512f") { "AVX-512" } else { "AVX2" };
    avx2.then_some(widest)
}

#[cfg(not(target_arch = "x86_64"))]
fn widest_instructions() -> Option<&'static str> {
    cfg!(target_arch = "aarch64").then_some("NEON")
}

#[test]
fn doctor_says_what_is_there_and_how_to_get_the_rest() {
    let found = findings();
    assert!(found["cpu"]["threads"].as_u64().unwrap() > 0);
    let (cuda, plain) = (&found["cuda"], stdout(&nibble(&["doctor"])));
    assert_eq!(found["cpu"]["instructions"].as_str(), widest_instructions());
    match widest_instructions() {
        Some(name) => assert!(plain.contains(&format!("products by {name}")), "{plain}"),
        None => assert!(plain.contains("products are slow"), "{plain}"),
    }
    if cuda["usable"] == true {
        assert!(plain.contains("training runs on it"), "{plain}");
        return;
    }
    let obstacle = cuda["obstacle"].as_str().unwrap();
    assert!(plain.contains(&format!("training runs on the CPU: {obstacle}")), "{plain}");
    for part in ["driver", "cublas"] {
        if cuda[part]["problem"].is_string() {
            assert!(cuda[part]["fix"].as_str().unwrap().contains("install"), "{cuda}");
        }
    }
}

#[test]
fn a_gpu_that_is_not_there_is_refused_with_the_reason() {
    if findings()["cuda"]["usable"] == true {
        return;
    }
    let model = "tests/data/models/llama_s0";
    let arguments = ["eval", "--model", model, "--data", "none.jsonl", "--device", "cuda:1"];
    let output = nibble(&arguments);
    assert_eq!(output.status.code(), Some(1));
    let message = stderr(&output);
    assert!(message.contains("error: --device cuda:1: "), "{message}");
    assert!(message.contains("hint: "), "{message}");
    let output = nibble(&["eval", "--model", model, "--data", "none.jsonl", "--device", "tpu"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected auto, cpu, cuda or cuda:N"));
}

#[test]
fn the_plan_of_a_gpu_needs_none() {
    let plan = |device: &str| -> Value {
        let config = "tests/data/models/llama_s0/config.json";
        let output = nibble(&["memory", "--model", config, "--json", "--device", device]);
        assert!(output.status.success(), "{}", stderr(&output));
        let mut plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        // What is free changes from one moment to the next.
        plan.as_object_mut().unwrap().remove("here");
        plan
    };
    let (cpu, gpu) = (plan("cpu"), plan("cuda"));
    assert_eq!(plan("auto"), cpu);
    let elements = |plan: &Value, name: &str| {
        let regions = plan["regions"].as_array().unwrap();
        let region = regions.iter().find(|region| region["name"] == name);
        region.map(|region| {
            (region["dtype"].as_str().unwrap().to_string(), region["elements"].clone())
        })
    };
    for (name, dtype) in [("layer.1.qkv", "bf16"), ("layer.1.lse", "f32"), ("head.logits", "bf16")]
    {
        let (device, host) = (elements(&gpu, name).unwrap(), elements(&cpu, name).unwrap());
        assert_eq!((device.0.as_str(), host.0.as_str(), &device.1), (dtype, "f32", &host.1));
    }
    // Behind each row of an operand there is room for an adapter of rank 16, to whole lines of the cache.
    let (device, host) = (elements(&gpu, "work.mlp").unwrap(), elements(&cpu, "work.mlp").unwrap());
    let config = std::fs::read("tests/data/models/llama_s0/config.json").unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let width = config["intermediate_size"].as_u64().unwrap();
    let rows = host.1.as_u64().unwrap() / width;
    assert_eq!(device.1.as_u64().unwrap(), rows * (width + 64));
    assert!(
        elements(&gpu, "cuda.workspace").is_some() && elements(&cpu, "cuda.workspace").is_none()
    );
}

/// Python's packages hold cuBLAS without a path to what lies beside it. They are found, and so are conda's
/// folder, CUDA's and one that is named.
#[cfg(target_os = "linux")]
#[test]
fn cublas_is_found_with_the_library_that_it_needs() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("lib");
    std::fs::create_dir(&folder).unwrap();
    let compile = |name: &str, source: &str, with: &[&str]| {
        let file = folder.join("source.c");
        std::fs::write(&file, source).unwrap();
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-o", name]).arg(format!("-Wl,-soname,{name}"));
        let status = command.arg(&file).args(with).current_dir(&folder).status();
        status.is_ok_and(|status| status.success())
    };
    let needed = "libcublasLt.so.12";
    if !compile(needed, "int inner(void) { return 1; }", &[]) {
        eprintln!("skipped: no C compiler to make libraries with");
        return;
    }
    let source = "int inner(void); int cublasCreate_v2(void) { return inner(); }";
    assert!(compile("libcublas.so.12", source, &["-Wl,--no-as-needed", needed]));
    let find = |variable: &str, value: &Path| {
        let mut command = training::nibble(root.path(), &["doctor", "--json"]);
        for other in ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "LD_LIBRARY_PATH"] {
            command.env_remove(other);
        }
        let found = json(&command.env(variable, value).output().unwrap());
        found["cuda"]["cublas"].to_string()
    };
    let check = |variable: &str, value: &Path, expected: &Path| {
        let library = find(variable, value);
        assert!(library.contains(expected.to_str().unwrap()), "{variable}: {library}");
    };
    check("NIBBLE_CUDA_LIB_DIR", &folder, &folder);
    if find("NIBBLE_CUDA_LIB_DIR", Path::new("none")).contains("libcublas") {
        eprintln!("skipped: other folders of cuBLAS (this machine has its own)");
        return;
    }
    check("CONDA_PREFIX", root.path(), &folder);
    check("CUDA_HOME", root.path(), &folder);
    let mut python = Command::new("python3");
    python.args(["-c", "import site; print(site.getusersitepackages())"]);
    let user = root.path().join("user");
    let output = python.env("PYTHONUSERBASE", &user).output();
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        eprintln!("skipped: no Python to find packages with");
        return;
    };
    let packages = Path::new(stdout(&output).trim()).join("nvidia/cublas");
    std::fs::create_dir_all(&packages).unwrap();
    std::fs::rename(&folder, packages.join("lib")).unwrap();
    check("PYTHONUSERBASE", &user, &packages.join("lib"));
}

#[test]
fn what_a_model_or_device_lacks_is_refused() {
    let small = "tests/data/models/llama_s0/config.json";
    let large = "tests/data/configs/llama-3.1-8b.json";
    let memory = |model: &str, flags: &[&str]| {
        nibble(&[&["memory", "--json", "--model", model][..], flags].concat())
    };
    let with = |model: &str, attention: &str| {
        memory(model, &["--device", "cuda", "--attn-implementation", attention])
    };
    let workspace = |attention: &str| {
        let output = with(large, attention);
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["components"]["attention workspace"].as_u64().unwrap()
    };
    assert_eq!(workspace("auto"), workspace("flash_attention_2"));
    // Scores and probabilities of 256 rows of the four heads that share a key, and their gradients.
    let scores = 4 * 256 * 2048 * (4 + 2) * 2;
    assert!(workspace("eager") - workspace("flash") > scores);
    let refused = [
        (with(small, "flash"), "have 16 columns", "--attn-implementation exact"),
        (memory(large, &["--attn-implementation", "flash"]), "CUDA backend", "leave it out"),
        (memory(large, &["--device", "cuda", "--bf16", "false"]), "in bf16", "--device cpu"),
        (
            nibble(&["generate", "--model", "none", "--attn-implementation", "flash"]),
            "CUDA backend",
            "leave it out",
        ),
    ];
    for (output, what, hint) in refused {
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(what) && message.contains(hint), "{message}");
    }
    for attention in ["auto", "exact"] {
        let output = memory(small, &["--attn-implementation", attention]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

#[test]
fn embedding_and_head_can_stay_on_the_host() {
    let memory = |model: &str, flags: &[&str]| {
        let base = ["memory", "--json", "--model", model, "--device", "cuda", "--quantization"];
        nibble(&[&base[..], &["nf4"], flags].concat())
    };
    let of = |flags: &[&str]| -> Value {
        let output = memory("tests/data/configs/llama-3.1-8b.json", flags);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (on_gpu, on_host) = (of(&[]), of(&["--embedding", "host-input"]));
    let bytes = |plan: &Value, key: &str| plan[key].as_u64().unwrap();
    let table = 128_256 * 4096 * 2;
    assert_eq!(bytes(&on_gpu, "total_bytes") - bytes(&on_host, "total_bytes"), table);
    assert_eq!(bytes(&on_host, "pinned_bytes") - bytes(&on_gpu, "pinned_bytes"), table);
    assert!(bytes(&on_gpu, "pinned_bytes") < 4 << 20, "only what is uploaded is staged");
    let fit = of(&["--fit", "--budget", "24GiB"]);
    let knobs = fit["fit"]["knobs"].as_array().unwrap().clone();
    let knob = |flags: &str| knobs.iter().find(|knob| knob["flags"] == flags).unwrap();
    let less = |flags| bytes(&fit, "planned_bytes") - bytes(knob(flags), "bytes");
    assert_eq!(less("--embedding host-input"), table);
    assert!(less("--embedding host") > table + table * 9 / 10);
    let (on_gpu, on_host) = (of(&[]), of(&["--embedding", "host"]));
    // Uploads for fewer chunks of rows.
    let pinned = bytes(&on_host, "pinned_bytes") - bytes(&on_gpu, "pinned_bytes");
    assert!((2 * table - 4096..=2 * table).contains(&pinned), "{pinned}");
    let tied = "tests/data/models/llama_tied_s2/config.json";
    assert!(memory(tied, &["--embedding", "host"]).status.success());
    let output = memory(tied, &["--embedding", "host-input"]);
    let message = stderr(&output);
    assert!(output.status.code() == Some(2) && message.contains("is its head, too"), "{message}");
}
