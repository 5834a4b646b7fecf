//! What Linux' control groups leave of their memory to this process: in a container the whole
//! system's free memory is not what it may take.
//!
//! Version 2 has `memory.max`, `memory.high`, `memory.current` and `memory.stat`, version 1
//! `memory.limit_in_bytes`, `memory.usage_in_bytes` and `memory.stat`; a limit holds for all groups
//! below. Pages of files that nobody used for a while (`inactive_file`) count as used, and are given
//! up for who needs them. Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and
//! cgroup-v1/memory.rst.

use std::fs;
use std::path::{Path, PathBuf};

/// Names of a version's files.
struct Files {
    limits: &'static [&'static str],
    used: &'static str,
    /// Line of `memory.stat` with the file pages, of the group and those below.
    idle: &'static str,
}

const VERSION_1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    idle: "total_inactive_file",
};
const VERSION_2: Files =
    Files { limits: &["memory.max", "memory.high"], used: "memory.current", idle: "inactive_file" };

/// Bytes that the groups of this process leave it; none where no group has a limit. `root` is `/`,
/// but for tests.
pub(super) fn left_bytes(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = root.join("sys/fs/cgroup");
    let of_group = |line: &str| {
        // Hierarchy, its controllers, path from the mount; version 2 has no controllers.
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        match controllers {
            "" => {
                let unified = mounts.join("unified");
                let mount = if unified.is_dir() { unified } else { mounts.clone() };
                least_left(&mount, path, &VERSION_2)
            }
            _ if controllers.split(',').any(|name| name == "memory") => {
                least_left(&mounts.join("memory"), path, &VERSION_1)
            }
            _ => None,
        }
    };
    groups.lines().filter_map(of_group).min()
}

/// The least that a group and those around it leave. A container sees its own group at the mount
/// though its path names the whole tree's: folders that are not there have no say.
fn least_left(mount: &Path, path: &str, files: &Files) -> Option<u64> {
    let own = mount.join(path.trim_start_matches('/'));
    let around = own.ancestors().take_while(|folder| folder.starts_with(mount));
    around.filter_map(|folder| left_in(folder, files)).min()
}

fn left_in(folder: &Path, files: &Files) -> Option<u64> {
    let number = |name: &&str| read(folder.join(name))?.trim().parse::<u64>().ok();
    let limit = files.limits.iter().filter_map(number).min()?;
    let used = number(&files.used)?;
    let stat = read(folder.join("memory.stat")).unwrap_or_default();
    let idle = stat.lines().find_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        (name == files.idle).then(|| bytes.trim().parse::<u64>().ok())?
    });
    Some(limit.saturating_sub(used.saturating_sub(idle.unwrap_or(0))))
}

fn read(path: PathBuf) -> Option<String> {
    fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root folder with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn left(files: &[(&str, &str)]) -> Option<u64> {
        left_bytes(root(files).path())
    }

    #[test]
    fn the_tightest_of_nested_groups_counts_without_idle_file_pages() {
        let service = "sys/fs/cgroup/box.slice/run.scope";
        let files = [
            ("proc/self/cgroup", "0::/box.slice/run.scope\n"),
            (&format!("{service}/memory.max"), "9000\n"),
            (&format!("{service}/memory.high"), "max\n"),
            (&format!("{service}/memory.current"), "5000\n"),
            (&format!("{service}/memory.stat"), "anon 2000\ninactive_file 3000\n"),
            ("sys/fs/cgroup/box.slice/memory.max", "max\n"),
            ("sys/fs/cgroup/box.slice/memory.current", "6000\n"),
        ];
        assert_eq!(left(&files), Some(9000 - 2000), "the outer group has no limit");
        let outer = |limit| {
            let mut files = files;
            files[5].1 = limit;
            left(&files)
        };
        assert_eq!(outer("8000\n"), Some(2000), "nothing is known of its idle pages");
        assert_eq!(outer("5000\n"), Some(0));
        let mut high = files;
        high[2].1 = "4000\n";
        assert_eq!(left(&high), Some(2000), "above it the kernel takes memory away again");
    }

    #[test]
    fn a_container_sees_its_group_at_the_mount() {
        let mut files = [
            ("proc/self/cgroup", "0::/somewhere/else\n"),
            ("sys/fs/cgroup/memory.max", "9000\n"),
            ("sys/fs/cgroup/memory.current", "4000\n"),
        ];
        assert_eq!(left(&files), Some(5000));
        files[1].1 = "max\n";
        assert_eq!(left(&files), None);
    }

    #[test]
    fn version_1_has_its_own_names() {
        let group = "sys/fs/cgroup/memory/docker/1f";
        let files = [
            ("proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/1f\n0::/\n"),
            (&format!("{group}/memory.limit_in_bytes"), "7000\n"),
            (&format!("{group}/memory.usage_in_bytes"), "6000\n"),
            (&format!("{group}/memory.stat"), "inactive_file 1\ntotal_inactive_file 2500\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "6000\n"),
            ("sys/fs/cgroup/unified/cgroup.procs", "1\n"),
        ];
        assert_eq!(left(&files), Some(7000 - 3500));
        assert_eq!(left(&[("proc/self/cgroup", "4:memory:/docker/1f\n")]), None);
        assert_eq!(left(&[]), None);
    }
}
