//! How much memory can still be had: of the host, and of the control groups that this process is in.
//!
//! Files and their meaning: the kernel's `Documentation/filesystems/proc.rst` (3.5 `mountinfo`),
//! `admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.

use std::path::{Path, PathBuf};

/// Bytes that can be had without swapping, huge pages aside: `MemAvailable` of `/proc/meminfo`, or what the
/// limits of this process's control groups leave, if that is less. Everything, if neither says.
pub fn available_bytes() -> u64 {
    available(&|path| std::fs::read_to_string(path).ok())
}

fn available(read: &dyn Fn(&Path) -> Option<String>) -> u64 {
    let host = read(Path::new("/proc/meminfo")).and_then(|text| of_host(&text));
    let groups = groups(read).into_iter().filter_map(|group| group.left(read));
    groups.chain(host).min().unwrap_or(u64::MAX)
}

fn of_host(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

struct Group {
    dir: PathBuf,
    v1: bool,
}

/// The group of this process and those above it, of each hierarchy that may have the memory controller.
fn groups(read: &dyn Fn(&Path) -> Option<String>) -> Vec<Group> {
    let said = |path| read(Path::new(path)).unwrap_or_default();
    let (own, mounts) = (said("/proc/self/cgroup"), said("/proc/self/mountinfo"));
    let mut found = Vec::new();
    for line in own.lines() {
        let mut words = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (words.next(), words.next()) else { continue };
        let v1 = controllers.split(',').any(|c| c == "memory");
        if !v1 && !controllers.is_empty() {
            continue;
        }
        let mount = mounts.lines().find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let mut kind = kind.split(' ');
            let (kind, options) = (kind.next()?, kind.nth(1)?);
            let is = match v1 {
                true => kind == "cgroup" && options.split(',').any(|o| o == "memory"),
                false => kind == "cgroup2",
            };
            let mut words = mount.split(' ').skip(3);
            is.then_some((words.next()?, words.next()?))
        });
        let Some((root, at)) = mount else { continue };
        // In a container the path may be one that cannot be seen there, whose group is the mount's root.
        let below = Path::new(path).strip_prefix(root).unwrap_or(Path::new(""));
        let ancestors = below.ancestors().map(|dir| Group { dir: Path::new(at).join(dir), v1 });
        found.extend(ancestors);
    }
    found
}

impl Group {
    /// What its limit leaves, file pages that can be given up counted as free; none if it has no limit.
    fn left(&self, read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
        let [limit, used, files] = match self.v1 {
            true => ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_"],
            false => ["memory.max", "memory.current", ""],
        };
        let number = |file| read(&self.dir.join(file))?.trim().parse::<u64>().ok();
        let (limit, used) = (number(limit)?, number(used)?);
        let stat = read(&self.dir.join("memory.stat")).unwrap_or_default();
        let files = stat.lines().filter_map(|line| {
            let (name, bytes) = line.strip_prefix(files)?.split_once(' ')?;
            let is = ["active_file", "inactive_file"].contains(&name);
            is.then(|| bytes.parse::<u64>().ok())?
        });
        Some(limit.saturating_sub(used.saturating_sub(files.sum())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(files: &[(&str, &str)]) -> u64 {
        available(&|path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(found.1.to_owned())
        })
    }

    const HOST: (&str, &str) =
        ("/proc/meminfo", "MemTotal:       24612340 kB\nMemAvailable:   8192 kB\n");
    const V1: [(&str, &str); 3] = [
        HOST,
        ("/proc/self/cgroup", "4:cpu,memory:/a/b\n1:name=systemd:/\n0::/x\n"),
        (
            "/proc/self/mountinfo",
            "35 31 0:32 / /sys/cg/memory rw,relatime shared:4 - cgroup cgroup rw,cpu,memory\n",
        ),
    ];
    const V2: [(&str, &str); 3] = [
        HOST,
        ("/proc/self/cgroup", "0::/a\n"),
        ("/proc/self/mountinfo", "35 31 0:32 / /cg rw - cgroup2 cgroup2 rw\n"),
    ];

    #[test]
    fn available_memory_is_read_from_the_kernels_words() {
        assert_eq!(on(&[HOST]), 8 << 20);
        for text in ["MemTotal: 1 kB\n", "MemAvailable: lots\n", ""] {
            assert_eq!(on(&[("/proc/meminfo", text)]), u64::MAX);
        }
    }

    #[test]
    fn the_limit_of_a_control_group_or_of_one_above_it_counts() {
        assert_eq!(on(&V1), 8 << 20);
        let own = [
            ("/sys/cg/memory/a/b/memory.limit_in_bytes", "4194304\n"),
            ("/sys/cg/memory/a/b/memory.usage_in_bytes", "3145728\n"),
            (
                "/sys/cg/memory/a/b/memory.stat",
                "active_file 9\ntotal_active_file 4096\ntotal_rss 7\n",
            ),
        ];
        assert_eq!(on(&[&V1[..], &own].concat()), (1 << 20) + 4096);
        let above = [
            ("/sys/cg/memory/a/memory.limit_in_bytes", "4194304\n"),
            ("/sys/cg/memory/a/memory.usage_in_bytes", "5242880\n"),
        ];
        assert_eq!(on(&[&V1[..], &own, &above].concat()), 0);
        // What v1 says when there is no limit.
        let none = [
            ("/sys/cg/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/cg/memory/memory.usage_in_bytes", "5242880\n"),
        ];
        assert_eq!(on(&[&V1[..], &none].concat()), 8 << 20);

        let own = [("/cg/a/memory.max", "4194304\n"), ("/cg/a/memory.current", "3145728\n")];
        assert_eq!(on(&[&V2[..], &own].concat()), 1 << 20);
        let none = [("/cg/a/memory.max", "max\n"), ("/cg/a/memory.current", "3145728\n")];
        assert_eq!(on(&[&V2[..], &none].concat()), 8 << 20);
    }

    #[test]
    fn a_group_that_a_container_cannot_see_is_the_root_of_its_mount() {
        let mut files = V2.to_vec();
        files[2].1 = "35 31 0:32 /docker/1 /cg rw - cgroup2 cgroup2 rw\n";
        files.extend([("/cg/memory.max", "2097152\n"), ("/cg/memory.current", "0\n")]);
        assert_eq!(on(&files), 2 << 20);
        files[1].1 = "0::/docker/1/in\n";
        files.extend([("/cg/in/memory.max", "1048576\n"), ("/cg/in/memory.current", "0\n")]);
        assert_eq!(on(&files), 1 << 20);
    }
}
