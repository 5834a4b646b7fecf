//! Tests of the tests: with one line of a kernel broken, results must be wrong in some order.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;

use crate::emulator::{Device, Emulator, ORDERS, PTX, devices, launch, ptx_library};
use crate::{dequantize, flash, mlp_adapters, row};

/// The kernels with `from` replaced by `to` in `file`.
fn mutant(name: &str, file: &str, from: &str, to: &str) -> Device {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutant-{}", name.replace(' ', "-")));
    for folder in ["src/kernels/cuda/device", "quant/src/cuda"] {
        fs::create_dir_all(copy.join(folder)).unwrap();
        let entries = fs::read_dir(root.join(folder)).unwrap();
        for path in entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            fs::copy(&path, copy.join(folder).join(path.file_name().unwrap())).unwrap();
        }
    }
    let source = fs::read_to_string(root.join(file)).unwrap();
    assert!(source.contains(from), "{file} has no `{from}`");
    fs::write(copy.join(file), source.replacen(from, to, 1)).unwrap();
    let library = copy.join("libmutant.so");
    let status = Command::new(root.join("tests/emulator/build.sh"))
        .arg(&library)
        .arg("-O1")
        .env("NIBBLE_SOURCES", &copy)
        .status()
        .unwrap();
    assert!(status.success());
    Device::Emulated(Emulator::open(&library).unwrap())
}

/// The kernels with a line of a file broken, and whether they are still right.
struct Mutant {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
    is_right: fn(&Device) -> bool,
}

const MUTANTS: [Mutant; 15] = [
    Mutant {
        name: "barrier of a sum",
        file: "reduce.cuh",
        from: "if (lane == 0) parts[warp] = x;\n    __syncthreads();",
        to: "if (lane == 0) parts[warp] = x;",
        is_right: sums_are_right,
    },
    Mutant {
        name: "wait for values",
        file: "flash_forward.cuh",
        from: "copy_async_wait<1>();",
        to: "",
        is_right: flash::is_right,
    },
    Mutant {
        name: "barrier after reading keys",
        file: "flash_forward.cuh",
        from: "__syncthreads();  // all have read the keys",
        to: "",
        is_right: flash::is_right,
    },
    Mutant {
        name: "barrier after reading queries",
        file: "flash_backward.cuh",
        from: "__syncthreads();  // all have read them",
        to: "",
        is_right: flash::is_right,
    },
    Mutant {
        name: "barrier after queries went to registers",
        file: "flash_backward.cuh",
        from: "__syncthreads();  // and in registers",
        to: "",
        is_right: flash::is_right,
    },
    Mutant {
        name: "warps that see nothing",
        file: "flash_tile.cuh",
        from: "first <= at + rows - 1 &&",
        to: "first <= at &&",
        is_right: flash::is_right,
    },
    Mutant {
        name: "window of one more",
        file: "flash_tile.cuh",
        from: "key > at - window",
        to: "key >= at - window",
        is_right: flash::is_right,
    },
    Mutant {
        name: "tiles that need no mask",
        file: "flash_tile.cuh",
        from: "first + keys - 1 <= position;",
        to: "first + keys - 1 <= position + rows;",
        is_right: flash::is_right,
    },
    Mutant {
        name: "barrier before the sums of warps",
        file: "mlp_adapters_backward.cuh",
        from: "__syncthreads();  // all have written theirs",
        to: "",
        is_right: mlp_adapters::is_right,
    },
    Mutant {
        name: "barrier before the next rows",
        file: "mlp_adapters_backward.cuh",
        from: "__syncthreads();  // all have read the stage",
        to: "",
        is_right: mlp_adapters::is_right,
    },
    Mutant {
        name: "barrier between the sums of warps",
        file: "mlp_adapters_backward.cuh",
        from: "if (first > 0) __syncthreads();  // all have read the last products",
        to: "",
        is_right: mlp_adapters::is_wide_right,
    },
    Mutant {
        name: "wait for rows of gate and up",
        file: "mlp_adapters_forward.cuh",
        from: "copy_async_wait<Shape::STAGES - 1>();",
        to: "",
        is_right: mlp_adapters::is_forward_right,
    },
    Mutant {
        name: "barrier before the sums of h",
        file: "mlp_adapters_forward.cuh",
        from: "__syncthreads();  // all have written theirs",
        to: "",
        is_right: mlp_adapters::is_forward_right,
    },
    Mutant {
        name: "barrier before the next rows of h",
        file: "mlp_adapters_forward.cuh",
        from: "__syncthreads();  // all have read the stage",
        to: "",
        is_right: mlp_adapters::is_forward_right,
    },
    Mutant {
        name: "wait for rows",
        file: "mlp_adapters_backward.cuh",
        from: "copy_async_wait<Shape::STAGES - 1>();",
        to: "",
        is_right: mlp_adapters::is_right,
    },
];

/// Σ of 4,000 ones over four warps.
fn sums_are_right(device: &Device) -> bool {
    let (x, mut sum) = (vec![1.0f32; 4000], [f64::NAN]);
    launch!(device, "sum_f32", [1, 1, 1], 128; &x[..], 4000i64, &mut sum[..]);
    sum[0] == 4000.0
}

/// And no threads race, which is a panic.
fn is_right_in_every_order(device: &Device, is_right: fn(&Device) -> bool) -> bool {
    ORDERS.iter().all(|&order| {
        device.order(order);
        catch_unwind(AssertUnwindSafe(|| is_right(device))).unwrap_or(false)
    })
}

/// `kernels` of the committed PTX, `from` replaced by `to` where it first stands in them.
fn ptx_mutant(kernels: &[&str], from: &str, to: &str) -> Device {
    let mut entries = PTX.split(".visible .entry ");
    let mut kept = entries.next().unwrap().to_string();
    for entry in entries.filter(|entry| kernels.contains(&entry.split('(').next().unwrap())) {
        kept = kept + ".visible .entry " + entry;
    }
    assert!(kept.contains(from), "the PTX has no `{from}`");
    let library = ptx_library(&kept.replacen(from, to, 1)).unwrap();
    Device::Emulated(Emulator::open(&library).unwrap())
}

#[test]
fn broken_ptx_is_wrong() {
    let Some(Device::Emulated(_)) = devices().first() else {
        println!("skipped: broken PTX (it is compiled for the CPU)");
        return;
    };
    let flash: &[&str] = &[
        "flash_forward_64",
        "flash_backward_keys_64",
        "flash_backward_queries_64",
        "attention_delta",
    ];
    let (flash, is_right): (_, fn(&Device) -> bool) = (flash, flash::is_right);
    let (dequantize, is_widened): (&[&str], fn(&Device) -> bool) =
        (&["dequantize_4bit"], dequantize::is_right);
    let (row, is_multiplied): (&[&str], fn(&Device) -> bool) =
        (&["linear_row_4bit"], row::is_right);
    let (mlp, is_shared): (&[&str], fn(&Device) -> bool) = (
        &[
            "mlp_forward",
            "mlp_backward",
            "mlp_adapters_backward_16",
            "mlp_adapters_inner",
            "mlp_adapters_gradients",
        ],
        mlp_adapters::is_right,
    );
    let breaks = [
        (flash, "bar.sync", "bar.sync", is_right, true),
        (flash, "bar.sync", "// bar.sync", is_right, false),
        (flash, "cp.async.wait_group 1;", "cp.async.wait_group 2;", is_right, false),
        (flash, "x4.trans.shared", "x4.shared", is_right, false),
        (dequantize, "bar.warp.sync", "bar.warp.sync", is_widened, true),
        (dequantize, "bar.warp.sync", "// bar.warp.sync", is_widened, false),
        (row, "bar.sync", "bar.sync", is_multiplied, true),
        (row, "bar.sync", "// bar.sync", is_multiplied, false),
        (mlp, "bar.sync", "bar.sync", is_shared, true),
        (mlp, "bar.sync", "// bar.sync", is_shared, false),
        (mlp, "bar.warp.sync", "// bar.warp.sync", is_shared, false),
    ];
    for (kernels, from, to, is_right, expected) in breaks {
        let mutant = ptx_mutant(kernels, from, to);
        assert_eq!(is_right_in_every_order(&mutant, is_right), expected, "{from} is now {to}");
    }
}

#[test]
fn broken_kernels_are_wrong() {
    let Some(intact @ Device::Emulated(_)) = devices().first() else {
        println!("skipped: broken kernels (they are compiled for the CPU)");
        return;
    };
    for Mutant { name, file, from, to, is_right } in &MUTANTS {
        assert!(is_right_in_every_order(intact, *is_right), "{name}: the intact kernel is right");
        let broken = mutant(name, &format!("src/kernels/cuda/device/{file}"), from, to);
        assert!(!is_right_in_every_order(&broken, *is_right), "{name}: nothing was noticed");
    }
}
