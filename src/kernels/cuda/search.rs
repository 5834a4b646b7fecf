//! Where CUDA's libraries are: `NIBBLE_CUDA_LIB_DIR`, the loader's own path, `CUDA_HOME` and its
//! like, conda's folder, `/usr/local/cuda`, and the folders of Python's `nvidia` packages; on Windows of
//! PyTorch, too.
#![allow(unsafe_code)]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use libloading::Library;

use crate::error::{Error, Result};

/// A library by the names under which it may be found.
#[derive(Debug)]
pub struct Wanted {
    /// What the library is, for people.
    pub title: &'static str,
    /// File names, best first, with the CUDA version that the driver must run at least.
    names: &'static [(&'static str, i32)],
    /// What to do where it is missing.
    pub fix: &'static str,
    /// Whether it may lie in CUDA's folders, not in the system's alone.
    bundled: bool,
    /// What the library itself needs of its own version and folder, as a part of its name and what
    /// stands there instead.
    beside: Option<(&'static str, &'static str)>,
}

/// The driver: comes with the system.
pub const DRIVER: Wanted = Wanted {
    title: "CUDA driver",
    names: if cfg!(windows) {
        &[("nvcuda.dll", 0)]
    } else {
        &[("libcuda.so.1", 0), ("libcuda.so", 0)]
    },
    fix: "install NVIDIA's driver, 525 or newer; in a container, start it with GPU access",
    bundled: false,
    beside: None,
};

/// Matrix products.
pub const CUBLAS: Wanted = Wanted {
    title: "cuBLAS",
    names: if cfg!(windows) {
        &[("cublas64_13.dll", 13), ("cublas64_12.dll", 12)]
    } else {
        &[("libcublas.so.13", 13), ("libcublas.so.12", 12)]
    },
    fix: "install the CUDA toolkit, or `pip install nvidia-cublas-cu12`, or set \
          NIBBLE_CUDA_LIB_DIR to the folder that holds it",
    bundled: true,
    beside: Some(("cublas", "cublasLt")),
};

/// A library that was opened. It is never closed: CUDA's libraries have threads and exit handlers of
/// their own, which would run into the gap.
pub struct Found {
    /// The library.
    pub library: &'static Library,
    /// File, with its folder where that was searched.
    pub name: String,
}

/// Opens a library that works with a driver that runs CUDA `version`.
///
/// # Errors
/// `Gpu` naming it, with the fix.
pub fn open(wanted: &Wanted, version: i32) -> Result<Found> {
    let fits = |(name, least): &(&'static str, i32)| (*least <= version).then_some(*name);
    let names: Vec<&str> = wanted.names.iter().filter_map(fits).collect();
    let refused = match find(wanted, &names) {
        Ok(found) => return Ok(found),
        Err(refused) => refused,
    };
    let newer: Vec<&str> = wanted.names.iter().map(|(name, _)| *name).collect();
    if let Ok(found) = find(wanted, &newer) {
        let what = format!("{} needs a newer driver: this one runs CUDA {version}", found.name);
        return Err(
            Error::gpu(what).hint("update NVIDIA's driver, or `pip install nvidia-cublas-cu12`")
        );
    }
    let names = names.join(" or ");
    let why = refused.unwrap_or_else(|| format!("{names} was not found"));
    Err(Error::gpu(format_args!("no {}: {why}", wanted.title)).hint(wanted.fix))
}

/// The first that opens; else why a file that is there does not.
fn find(wanted: &Wanted, names: &[&str]) -> std::result::Result<Found, Option<String>> {
    let mut folders: Vec<Option<PathBuf>> = Vec::new();
    if wanted.bundled {
        folders.extend(std::env::var_os("NIBBLE_CUDA_LIB_DIR").map(|dir| Some(dir.into())));
    }
    folders.push(None);
    first(wanted, names, &folders).or_else(|refused| {
        let further = if wanted.bundled { further_folders() } else { Vec::new() };
        first(wanted, names, &further).map_err(|further| refused.or(further))
    })
}

fn first(
    wanted: &Wanted,
    names: &[&str],
    folders: &[Option<PathBuf>],
) -> std::result::Result<Found, Option<String>> {
    let paths = folders.iter().flat_map(|folder| {
        names.iter().map(move |name| match folder {
            Some(folder) => folder.join(name),
            None => PathBuf::from(name),
        })
    });
    let mut refused = None;
    for path in paths {
        if let Some((part, instead)) = wanted.beside.filter(|_| path.is_file()) {
            // Once it is open, whoever needs a library of its name has it, and not one of another
            // version that the loader finds first.
            beside(&path, part, instead).map(|needed| load(needed.as_os_str()));
        }
        match load(path.as_os_str()) {
            Ok(library) => return Ok(Found { library, name: path.display().to_string() }),
            Err(error) if path.is_file() => {
                refused.get_or_insert(format!("{} cannot be opened: {error}", path.display()));
            }
            Err(_) => {}
        }
    }
    Err(refused)
}

/// The file that has `instead` for `part` in its name.
fn beside(path: &Path, part: &str, instead: &str) -> Option<PathBuf> {
    Some(path.with_file_name(path.file_name()?.to_str()?.replace(part, instead)))
}

fn load(path: &OsStr) -> std::result::Result<&'static Library, libloading::Error> {
    // SAFETY: NVIDIA's libraries may be opened at any time; their initialisers touch nothing of ours.
    let library = unsafe { open_library(path) }?;
    Ok(Box::leak(Box::new(library)))
}

#[cfg(not(windows))]
unsafe fn open_library(path: &OsStr) -> std::result::Result<Library, libloading::Error> {
    // SAFETY: the caller's.
    unsafe { Library::new(path) }
}

/// The driver is the system's: not what a file of its name in the folder at work says. Others are where
/// `PATH` has them, too.
#[cfg(windows)]
unsafe fn open_library(path: &OsStr) -> std::result::Result<Library, libloading::Error> {
    use libloading::os::windows::{LOAD_LIBRARY_SEARCH_SYSTEM32, Library as Windows};
    let is_system = DRIVER.names.iter().any(|(name, _)| path == *name);
    let flags = if is_system { LOAD_LIBRARY_SEARCH_SYSTEM32 } else { 0 };
    // SAFETY: the caller's.
    unsafe { Windows::load_with_flags(path, flags) }.map(Library::from)
}

/// Where libraries lie on this system.
struct Places {
    /// Folders in CUDA's own and in conda's.
    cuda: &'static [&'static str],
    conda: &'static [&'static str],
    /// Folders of Python's packages, as patterns, and in Python's own.
    packages: &'static [&'static str],
    prefix: &'static str,
    /// Names of Python.
    pythons: &'static [&'static str],
}

/// What `lib64` leads to in CUDA's own folder.
const CUDA_TARGET: &str = if cfg!(target_arch = "aarch64") {
    "targets/sbsa-linux/lib"
} else {
    "targets/x86_64-linux/lib"
};

/// CUDA 13 has a folder for each kind of processor on Windows; PyTorch's packages bring libraries there.
const PLACES: Places = if cfg!(windows) {
    Places {
        cuda: &["bin/x64", "bin"],
        conda: &["Library/bin/x64", "Library/bin"],
        packages: &["nvidia/*/bin/x86_64", "nvidia/*/bin", "torch/lib"],
        prefix: "Library/bin",
        pythons: &["python", "py"],
    }
} else {
    Places {
        cuda: &["lib64", "lib", CUDA_TARGET],
        conda: &["lib"],
        packages: &["nvidia/*/lib"],
        prefix: "lib",
        pythons: &["python3"],
    }
};

/// CUDA's folders, conda's, and those of Python's packages, where there is a Python.
fn further_folders() -> Vec<Option<PathBuf>> {
    const SCRIPT: &str = "import glob, os, site, sys\n\
        *patterns, own = sys.argv[1:]\n\
        for root in site.getsitepackages() + [site.getusersitepackages()]:\n    \
        for pattern in patterns:\n        \
        [print(folder) for folder in sorted(glob.glob(os.path.join(root, pattern)), reverse=True)]\n\
        print(os.path.join(sys.prefix, own))";
    let Places { cuda, conda, packages, prefix, pythons } = PLACES;
    let named = [("CUDA_HOME", cuda), ("CUDA_PATH", cuda), ("CONDA_PREFIX", conda)];
    let named = named.into_iter().filter_map(|(variable, folders)| {
        let root = PathBuf::from(std::env::var_os(variable)?);
        Some(folders.iter().map(move |folder| Some(root.join(folder))))
    });
    let mut folders: Vec<_> = named.flatten().collect();
    if cfg!(unix) {
        folders.extend(cuda.iter().map(|folder| Some(Path::new("/usr/local/cuda").join(folder))));
    }
    let ask = |python: &&str| {
        let mut command = Command::new(python);
        command.args(["-X", "utf8", "-c", SCRIPT]).args(packages).arg(prefix);
        command.output().ok().filter(|output| output.status.success())
    };
    let output = pythons.iter().find_map(ask).map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output);
    folders.extend(text.lines().map(|line| Some(PathBuf::from(line))));
    folders
}
