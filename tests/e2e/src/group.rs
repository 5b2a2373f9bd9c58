//! A control group that the kernel holds to its limit.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Host;

/// A control group, of either version.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    v2: bool,
}

impl Group {
    /// One that may hold so much; says on standard output why there is none.
    pub fn make(name: &str, limit_bytes: u64) -> Option<Self> {
        let tried = Self::tried(name, limit_bytes);
        tried.inspect_err(|why| println!("SKIP: no control group with a memory limit: {why}")).ok()
    }

    fn tried(name: &str, limit_bytes: u64) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
        let has = |text: &str, by| text.trim_end().split(by).any(|word| word == "memory");
        let (root, v2) = mounts
            .lines()
            .find_map(|line| {
                let mut words = line.split(' ').skip(1);
                let (root, kind, options) = (words.next()?, words.next()?, words.next()?);
                let controllers = || fs::read_to_string(Path::new(root).join("cgroup.controllers"));
                match kind {
                    "cgroup" if has(options, ',') => Some((PathBuf::from(root), false)),
                    "cgroup2" if has(&controllers().ok()?, ' ') => Some((root.into(), true)),
                    _ => None,
                }
            })
            .ok_or("no memory controller is mounted")?;
        let write = |path: &Path, text: &str| {
            fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
        };
        if v2 {
            write(&root.join("cgroup.subtree_control"), "+memory")?;
        }
        let dir = root.join(format!("ferry-e2e-{}-{name}", std::process::id()));
        fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let group = Self { dir, v2 };
        group.limit(limit_bytes)?;
        Ok(group)
    }

    /// Lets it hold no more than this from now on.
    ///
    /// # Errors
    /// The kernel's word: v1 takes no limit below what is in use.
    pub fn limit(&self, bytes: u64) -> Result<(), String> {
        let file = if self.v2 { "memory.max" } else { "memory.limit_in_bytes" };
        let file = self.dir.join(file);
        fs::write(&file, bytes.to_string()).map_err(|e| format!("{}: {e}", file.display()))
    }

    /// `host`, with all that it starts in this group.
    pub fn around(&self, host: &Host) -> Host {
        let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.dir.display());
        let before = ["sh", "-c", &join, "sh"].map(str::to_owned);
        Host { before: before.into(), ..host.clone() }
    }

    fn number(&self, file: &str, key: &str) -> u64 {
        let said = fs::read_to_string(self.dir.join(file)).expect("the kernel's figures");
        let line = said.lines().find_map(|line| line.strip_prefix(key)).expect("a figure");
        line.trim().parse().expect("a number")
    }

    /// How many processes were killed since the limit was reached and nothing could be given up.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        self.number(file, "oom_kill ")
    }

    /// Bytes that its members use.
    pub fn used(&self) -> u64 {
        self.number(if self.v2 { "memory.current" } else { "memory.usage_in_bytes" }, "")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever was in it was killed; the kernel takes a moment to forget.
        for _ in 0..50 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("{} is left behind", self.dir.display());
    }
}
