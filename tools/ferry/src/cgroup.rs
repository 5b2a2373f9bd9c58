//! A control group that holds processes to so much memory, under cgroup v2 or v1; and the host's memory pressure.
//!
//! Files and their meaning: the kernel's `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ferry_overcommit::Pressure;

/// Why a control group could not be had or asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// no memory controller
    #[error(
        "no control group hierarchy has the memory controller: mount cgroup2, or boot without `cgroup_disable=memory`"
    )]
    NoController,
    /// a file of a control group that does not do what it should
    #[error("cannot {what} ({}){hint}", path.display())]
    Refused {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// a file that holds something else
    #[error("{} says `{said}`, which is not understood: is it a control group's?", path.display())]
    Strange {
        /// Which.
        path: PathBuf,
        /// What it says.
        said: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where control groups for memory are made, so that limits which hold for this process hold for them, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    dir: PathBuf,
    version: Version,
}

impl Hierarchy {
    /// The one that this host has mounted.
    pub(crate) fn mounted() -> Result<Self, CgroupError> {
        let [mounts, own] =
            ["/proc/self/mounts", "/proc/self/cgroup"].map(|path| read(Path::new(path)));
        Self::among(&mounts?, &own?).ok_or(CgroupError::NoController)
    }

    /// The one with the memory controller among `mounts`, for a process in `own`: as the files above list them.
    fn among(mounts: &str, own: &str) -> Option<Self> {
        let has = |text: &str, by| text.trim_end().split(by).any(|word| word == "memory");
        let (root, version) = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let (root, kind, options) = (words.next()?, words.next()?, words.next()?);
            let root = PathBuf::from(root.replace("\\040", " "));
            let version = match kind {
                "cgroup" if has(options, ',') => Version::V1,
                // The controller may be in a v1 hierarchy, and then it is not in this one.
                "cgroup2"
                    if has(&fs::read_to_string(root.join("cgroup.controllers")).ok()?, ' ') =>
                {
                    Version::V2
                }
                _ => return None,
            };
            Some((root, version))
        })?;
        let own = own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            let this =
                if version == Version::V1 { has(controllers, ',') } else { controllers.is_empty() };
            this.then(|| Path::new(path))
        });
        // Under v2 a group with processes may not have groups to limit: it has siblings.
        let place =
            own.and_then(|path| if version == Version::V1 { Some(path) } else { path.parent() });
        let dir = place.and_then(|path| Some(root.join(path.strip_prefix("/").ok()?)));
        // In a container the path may be that of the host.
        Some(Self { dir: dir.filter(|dir| dir.is_dir()).unwrap_or(root), version })
    }

    /// Makes a group that may hold `limit_bytes`; nothing of it goes to the host's own swap. Processes that its
    /// members start are in it, too.
    pub(crate) fn make(&self, name: &str, limit_bytes: u64) -> Result<Cgroup, CgroupError> {
        let dir = self.dir.join(name);
        if self.version == Version::V2 {
            let on = self.dir.join("cgroup.subtree_control");
            if !read(&on)?.split_whitespace().any(|word| word == "memory") {
                write(&on, "+memory", "turn the memory controller on")?;
            }
        }
        fs::create_dir(&dir).map_err(|source| CgroupError::Refused {
            what: "make a control group",
            path: dir.clone(),
            hint: if source.kind() == io::ErrorKind::AlreadyExists {
                ": another run has it, or one was killed: choose another name, or remove it by `rmdir`"
            } else {
                MAY
            },
            source,
        })?;
        let group = Cgroup { dir, version: self.version };
        let set = group.limit(limit_bytes);
        if set.is_err() {
            // It is of no use, and the first error is the one to tell.
            let _ = fs::remove_dir(&group.dir);
        }
        set.map(|()| group)
    }
}

/// A control group. It lasts until it is [removed](Self::remove).
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: PathBuf,
    version: Version,
}

/// What the members of a group take, and what became of its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Memory in use, in bytes.
    pub(crate) bytes: u64,
    /// The most that ever was, in bytes; none: the kernel does not tell (v2 before Linux 5.19).
    pub(crate) peak_bytes: Option<u64>,
    /// How often the limit was run against, so that something had to be given up first.
    pub(crate) limit_hits: u64,
    /// How many processes were killed since nothing could be given up.
    pub(crate) oom_kills: u64,
}

impl Cgroup {
    fn limit(&self, bytes: u64) -> Result<(), CgroupError> {
        let set = |name: &str, bytes: u64| {
            write(&self.dir.join(name), &bytes.to_string(), "set a memory limit")
        };
        let (limit, swap) = match self.version {
            // Not `memory.memsw.limit_in_bytes`: where that is run against first, nothing counts it.
            Version::V1 => ("memory.limit_in_bytes", "memory.swappiness"),
            Version::V2 => ("memory.max", "memory.swap.max"),
        };
        set(limit, bytes)?;
        match set(swap, 0) {
            // A kernel without swap.
            Err(CgroupError::Refused { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Moves a process in, with what it will start; what it holds already stays where it was counted.
    pub(crate) fn put(&self, pid: u32) -> Result<(), CgroupError> {
        let path = self.dir.join("cgroup.procs");
        write(&path, &pid.to_string(), "move a process into a control group")
    }

    /// What its members take.
    pub(crate) fn usage(&self) -> Result<Usage, CgroupError> {
        let number = |name: &str| number(&self.dir.join(name));
        let keyed = |name: &str, key: &str| keyed(&self.dir.join(name), key);
        Ok(match self.version {
            Version::V1 => Usage {
                bytes: number("memory.usage_in_bytes")?,
                peak_bytes: Some(number("memory.max_usage_in_bytes")?),
                limit_hits: number("memory.failcnt")?,
                oom_kills: keyed("memory.oom_control", "oom_kill")?,
            },
            Version::V2 => Usage {
                bytes: number("memory.current")?,
                peak_bytes: number("memory.peak").ok(),
                limit_hits: keyed("memory.events", "max")?,
                oom_kills: keyed("memory.events", "oom_kill")?,
            },
        })
    }

    /// How long its members waited for memory; of the whole host where groups are not told apart (v1).
    pub(crate) fn pressure(&self) -> Result<Pressure, CgroupError> {
        match self.version {
            Version::V1 => pressure(),
            Version::V2 => pressure_in(&self.dir.join("memory.pressure")),
        }
    }

    /// Removes it; its members must have ended.
    pub(crate) fn remove(self) -> Result<(), CgroupError> {
        fs::remove_dir(&self.dir).map_err(|source| CgroupError::Refused {
            what: "remove a control group",
            path: self.dir.clone(),
            hint: ": its processes must have ended",
            source,
        })
    }
}

/// How long tasks of this host waited for memory.
pub(crate) fn pressure() -> Result<Pressure, CgroupError> {
    pressure_in(Path::new("/proc/pressure/memory"))
}

fn pressure_in(path: &Path) -> Result<Pressure, CgroupError> {
    let said = read(path)?;
    Pressure::parse(&said).ok_or_else(|| strange(path, &said))
}

const MAY: &str = ": run as root, or by `systemd-run --user --scope`";

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|source| CgroupError::Refused {
        what: "read",
        path: path.to_owned(),
        hint: "",
        source,
    })
}

fn write(path: &Path, text: &str, what: &'static str) -> Result<(), CgroupError> {
    let refused = |source| CgroupError::Refused { what, path: path.to_owned(), hint: MAY, source };
    // Made by the kernel, if it knows it: never by this.
    let mut file = fs::OpenOptions::new().write(true).open(path).map_err(refused)?;
    io::Write::write_all(&mut file, text.as_bytes()).map_err(refused)
}

fn strange(path: &Path, said: &str) -> CgroupError {
    CgroupError::Strange { path: path.to_owned(), said: said.trim_end().to_owned() }
}

fn number(path: &Path) -> Result<u64, CgroupError> {
    let said = read(path)?;
    said.trim_end().parse().map_err(|_| strange(path, &said))
}

/// The number behind `key` at the beginning of a line.
fn keyed(path: &Path, key: &str) -> Result<u64, CgroupError> {
    let said = read(path)?;
    let found =
        said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
    found.ok_or_else(|| strange(path, &said))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    const MIB: u64 = 1 << 20;

    /// A directory with these files in it.
    fn dir_of(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("written");
        }
        dir
    }

    #[test]
    fn the_memory_controller_is_found_wherever_it_is_mounted() {
        let v2 = dir_of(&[("cgroup.controllers", "cpu io memory pids\n")]);
        fs::create_dir_all(v2.path().join("user.slice/session-1.scope")).expect("made");
        let empty = dir_of(&[("cgroup.controllers", "hugetlb\n")]);
        let (v2, empty) = (v2.path(), empty.path());
        let mounts = |dir: &Path| {
            format!("proc /proc proc rw 0 0\ncgroup2 {} cgroup2 rw 0 0\n", dir.display())
        };
        let among = |mounts: &str, own| Hierarchy::among(mounts, own).map(|h| (h.dir, h.version));
        for (own, dir) in [
            ("0::/user.slice/session-1.scope\n", v2.join("user.slice")),
            ("0::/session-1.scope\n", v2.to_owned()),
            ("0::/\n", v2.to_owned()),
            ("0::/of/a/host\n", v2.to_owned()),
        ] {
            assert_eq!(among(&mounts(v2), own), Some((dir, Version::V2)), "{own}");
        }
        assert_eq!(among(&mounts(empty), "0::/\n"), None);

        let v1 = dir_of(&[]);
        fs::create_dir(v1.path().join("job")).expect("made");
        let both = format!(
            "{}cgroup {} cgroup rw,relatime,memory 0 0\n",
            mounts(empty),
            v1.path().display()
        );
        let own = "3:cpu:/\n2:memory:/job\n0::/\n";
        assert_eq!(among(&both, own), Some((v1.path().join("job"), Version::V1)));
    }

    #[test]
    fn a_group_of_v2_is_limited_and_read() {
        let dir = dir_of(&[
            ("memory.max", "max\n"),
            ("memory.swap.max", "max\n"),
            ("cgroup.procs", ""),
            ("memory.current", "4096\n"),
            ("memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 2\noom_group_kill 0\n"),
            ("memory.pressure", "some avg10=3.00 total=1\nfull avg10=1.00 total=1\n"),
        ]);
        let group = Cgroup { dir: dir.path().to_owned(), version: Version::V2 };
        group.limit(6 << 30).expect("limited");
        group.put(17).expect("put");
        for (file, text) in
            [("memory.max", "6442450944"), ("memory.swap.max", "0"), ("cgroup.procs", "17")]
        {
            let said = fs::read_to_string(dir.path().join(file)).expect("read");
            assert!(said.starts_with(text), "{file}: {said}");
        }
        let usage = Usage { bytes: 4096, peak_bytes: None, limit_hits: 7, oom_kills: 2 };
        assert_eq!(group.usage().expect("read"), usage);
        assert_eq!(group.pressure().expect("read"), Pressure { some: 3.0, full: 1.0 });
        fs::write(dir.path().join("memory.current"), "much\n").expect("written");
        let said = group.usage().expect_err("no number").to_string();
        assert!(said.contains("memory.current says `much`"), "{said}");
    }

    #[test]
    fn a_group_that_cannot_be_limited_is_not_left_behind() {
        let dir = dir_of(&[("cgroup.subtree_control", "cpu\n")]);
        let hierarchy = Hierarchy { dir: dir.path().to_owned(), version: Version::V2 };
        let said =
            hierarchy.make("g", MIB).expect_err("the kernel makes no files here").to_string();
        assert!(said.contains("set a memory limit") && said.contains("as root"), "{said}");
        assert!(!dir.path().join("g").exists());
        let control = fs::read_to_string(dir.path().join("cgroup.subtree_control")).expect("read");
        assert!(control.starts_with("+memory"), "{control}");
        fs::create_dir(dir.path().join("g")).expect("made");
        let said = hierarchy.make("g", MIB).expect_err("it is there").to_string();
        assert!(said.contains("another name"), "{said}");
    }

    #[test]
    fn pressure_of_this_host_is_read() {
        if !Path::new("/proc/pressure/memory").exists() {
            eprintln!("SKIP: no /proc/pressure: the kernel has no PSI");
            return;
        }
        let Pressure { some, full } = pressure().expect("read");
        assert!((0.0..=100.0).contains(&some) && (0.0..=100.0).contains(&full), "{some} {full}");
    }

    #[test]
    fn a_process_that_takes_more_than_its_group_may_is_killed_and_that_is_told() {
        let name = format!("ferry-test-{}", std::process::id());
        let group = match Hierarchy::mounted().and_then(|h| h.make(&name, 32 * MIB)) {
            Ok(group) => group,
            Err(e) => {
                eprintln!(
                    "SKIP: no control group with a memory limit: {}",
                    ferry_migrate::words(&e)
                );
                return;
            }
        };
        assert_eq!(group.usage().expect("read").oom_kills, 0);
        // A line that never ends, of which `tail` keeps all.
        let mut shell = Command::new("sh");
        shell.args(["-c", "read go && exec tail -n 1 /dev/zero"]).stdin(Stdio::piped());
        let mut child = shell.spawn().expect("sh runs");
        let put = group.put(child.id());
        if put.is_err() {
            child.kill().expect("killed");
        }
        let mut stdin = child.stdin.take().expect("piped");
        let told = stdin.write_all(b"go\n");
        let status = child.wait().expect("it ends");
        let usage = group.usage();
        group.remove().expect("nobody is in it");
        put.expect("put");
        told.expect("told");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
        let usage = usage.expect("read");
        assert!(usage.oom_kills >= 1 && usage.limit_hits >= 1, "{usage:?}");
        assert!(
            usage.peak_bytes.is_none_or(|peak| (16 * MIB..=32 * MIB).contains(&peak)),
            "{usage:?}"
        );
    }
}
