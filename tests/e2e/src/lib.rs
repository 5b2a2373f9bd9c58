//! Whole machines moved between processes: the real `ferry` command, two hosts in a temporary directory.
//!
//! [`Hosts`] is two hosts of one authority, [`Host`] one of them, [`Running`] a process of theirs that is
//! killed when it is dropped. Time-outs only find what hangs: nothing here judges how fast something is.

pub mod group;
pub mod network;
mod process;

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

pub use process::{Done, HANG, Running};

/// What `--cmdline` of the built-in guests is when nothing else is asked for: a quarter of the memory
/// hard to compress, rewritten and checked without end.
pub const BUSY: &str = "pattern=working-set set=4M rate=2000 random=25";

/// The `ferry` binary, built on first use as this test was, unless it is new; `FERRY_BINARY` names another one.
pub fn ferry() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(binary) = std::env::var_os("FERRY_BINARY") {
            return binary.into();
        }
        // TARGET/PROFILE/deps/TEST, or TARGET/PROFILE/BENCHMARK
        let exe = std::env::current_exe().expect("this program has a path");
        let folder = exe.parent().expect("it lies in a folder");
        let profile = if folder.ends_with("deps") { folder.parent() } else { Some(folder) };
        let profile = profile.expect("it lies in a target directory");
        let binary = profile.join("ferry");
        if is_new(&binary) {
            return binary;
        }
        let target = profile.parent().expect("the profile's folder lies in a target directory");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "-p", "ferry", "--manifest-path"]);
        build.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"));
        build.arg("--target-dir").arg(target);
        // What cargo says of this package is not so of others: build scripts that look at it would run
        // again, and half of all crates after them.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                build.env_remove(name);
            }
        }
        if profile.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo starts").success(), "ferry does not build");
        binary
    })
}

/// Whether `binary` is younger than all that it is made of: built with the tests of the workspace, for one. With
/// features of dependencies that only tests want, which cargo leaves out here, and builds all anew for it.
fn is_new(binary: &Path) -> bool {
    fn newest(path: PathBuf) -> std::io::Result<SystemTime> {
        let about = path.metadata()?;
        let mut newest_of_all = about.modified()?;
        if about.is_dir() {
            for entry in path.read_dir()? {
                newest_of_all = newest_of_all.max(newest(entry?.path())?);
            }
        }
        Ok(newest_of_all)
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let parts = ["Cargo.lock", "Cargo.toml", "dirtylog", "memory", "migrate", "postcopy", "tools"];
    let written = parts.iter().chain(&["transport"]).map(|part| newest(workspace.join(part)));
    let built = newest(binary.to_owned());
    built.is_ok_and(|built| {
        written.into_iter().all(|written| written.is_ok_and(|written| written < built))
    })
}

/// Whether KVM machines can run here; says so on standard output if not.
pub fn kvm() -> bool {
    can("/dev/kvm", std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop))
}

fn can(what: &str, tried: std::io::Result<()>) -> bool {
    if let Err(e) = &tried {
        println!("SKIP: {what} cannot be opened: {e}");
    }
    tried.is_ok()
}

/// Polls `probe` until it gives something; panics with `what` if it does not.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(began.elapsed() < HANG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Two hosts on this machine, with identities of one authority.
#[derive(Debug)]
pub struct Hosts {
    dir: TempDir,
    /// Where machines start.
    pub source: Host,
    /// Where they go.
    pub destination: Host,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new()
    }
}

impl Hosts {
    /// Two hosts with nothing running.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let pki = dir.path().join("pki");
        let host = |name: &str| Host {
            runtime: dir.path().join(name),
            identity: pki.join(name),
            before: Vec::new(),
            binary: None,
        };
        let (source, destination) = (host("a"), host("b"));
        source.run(&["pki", "init", path(&pki), "--host", "a", "--host", "b"]).succeeded();
        Self { dir, source, destination }
    }

    /// A path in the hosts' temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Moves a new machine from the source to the destination, back, and so on, `times` times in all.
    pub fn to_and_fro(&self, kernel: &str, times: usize) {
        let (mut here, mut there) = (&self.source, &self.destination);
        let mut process = here.boot("m", kernel, &[]);
        for _ in 0..times {
            let (receiver, to) = there.receive(&["--once"]);
            here.migrate("m", to, &[]).completed();
            there.works("m");
            process.end().succeeded();
            process = receiver;
            (here, there) = (there, here);
        }
        here.run(&["vm", "stop", "m"]).succeeded();
        process.end().succeeded();
    }
}

/// One host: a runtime directory and an identity.
#[derive(Clone, Debug)]
pub struct Host {
    /// What `--runtime-dir` is.
    pub runtime: PathBuf,
    /// What `--identity` is.
    pub identity: PathBuf,
    /// What stands before `ferry`, such as `ip netns exec NAME`.
    pub before: Vec<String>,
    /// The `ferry` of this host where it is not the one that is tested ([`ferry`]).
    pub binary: Option<PathBuf>,
}

/// A path as text: the paths of tests are plain.
pub fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

impl Host {
    /// `ferry` on this host, with `args`.
    pub fn command(&self, args: &[&str]) -> Command {
        let binary = self.binary.as_deref().unwrap_or_else(|| ferry());
        let mut words = self.before.iter().map(AsRef::as_ref).chain([binary.as_os_str()]);
        let mut command = Command::new(words.next().expect("at least ferry"));
        command.args(words).arg("--runtime-dir").arg(&self.runtime).args(args);
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> Done {
        self.start(args).end()
    }

    /// Starts a command that takes its time.
    pub fn start(&self, args: &[&str]) -> Running {
        Running::start(self.command(args), args)
    }

    /// `ferry vm run`; back when the machine runs. A built-in guest has written and checked pages.
    pub fn boot(&self, name: &str, kernel: &str, more: &[&str]) -> Running {
        let mut args = vec!["vm", "run", name, "--kernel", kernel, "--memory", "64M"];
        if !more.contains(&"--cmdline") {
            args.extend(["--cmdline", BUSY]);
        }
        // The last word counts.
        args.retain(|a| !(more.contains(&"--memory") && ["--memory", "64M"].contains(a)));
        args.extend(more);
        let running = self.start(&args);
        running.line("runs (");
        if kernel.starts_with(':') {
            self.works(name);
        }
        running
    }

    /// `ferry receive` on a free port of the loopback; back when it listens, with its address.
    pub fn receive(&self, more: &[&str]) -> (Running, SocketAddr) {
        self.receive_on("127.0.0.1:0", more)
    }

    /// `ferry receive` on `listen`; back when it listens, with its address.
    pub fn receive_on(&self, listen: &str, more: &[&str]) -> (Running, SocketAddr) {
        let mut args = vec!["receive", "--listen", listen, "--identity", path(&self.identity)];
        // What it gave up by mistake ends it, and its test fails.
        if !more.contains(&"--sandbox") {
            args.extend(["--sandbox", "strict"]);
        }
        args.extend(more);
        let running = self.start(&args);
        let line = running.line("receiving on");
        let addr = line.split_whitespace().find_map(|word| word.parse().ok());
        (running, addr.unwrap_or_else(|| panic!("no address in: {line}")))
    }

    /// Starts `ferry migrate`.
    pub fn start_migrate(&self, name: &str, to: impl Display, more: &[&str]) -> Running {
        let to = to.to_string();
        let mut args = vec!["migrate", name, "--to", &to];
        if !more.contains(&"--identity") {
            args.extend(["--identity", path(&self.identity)]);
        }
        args.extend(more);
        self.start(&args)
    }

    /// `ferry migrate --json` to its end.
    pub fn migrate(&self, name: &str, to: impl Display, more: &[&str]) -> Moved {
        self.start_migrate(name, to, &[&["--json"], more].concat()).end().into()
    }

    /// `ferry vm show --json`, if the machine is there.
    pub fn show(&self, name: &str) -> Option<Value> {
        let shown = self.run(&["vm", "show", name, "--json"]);
        (shown.status == Some(0)).then(|| shown.json())
    }

    /// The state of a machine that must be there.
    pub fn state(&self, name: &str) -> String {
        let shown =
            self.show(name).unwrap_or_else(|| panic!("no machine {name} on {:?}", self.runtime));
        shown["state"].as_str().expect("state is text").to_owned()
    }

    /// Pages that a built-in guest has checked.
    pub fn checked(&self, name: &str) -> u64 {
        let shown =
            self.show(name).unwrap_or_else(|| panic!("no machine {name} on {:?}", self.runtime));
        shown["pages_checked"].as_u64().unwrap_or(0)
    }

    /// Waits until a built-in guest has gone on checking its pages, and sees that it found none wrong.
    pub fn works(&self, name: &str) {
        let before = self.checked(name);
        wait_for(&format!("machine {name} checks pages"), || {
            (self.checked(name) > before).then_some(())
        });
        assert_eq!(self.state(name), "running");
    }

    /// Names that `ferry vm list --json` lists.
    pub fn machines(&self) -> Vec<String> {
        let listed = self.run(&["vm", "list", "--json"]).succeeded().json();
        let names = listed.as_array().expect("a list").iter();
        names.map(|m| m["name"].as_str().expect("a name").to_owned()).collect()
    }
}

/// What `ferry migrate --json` said.
#[derive(Debug)]
pub struct Moved {
    /// Its exit status.
    pub status: Option<i32>,
    /// The object.
    pub report: Value,
}

impl From<Done> for Moved {
    fn from(done: Done) -> Self {
        Self { status: done.status, report: done.json() }
    }
}

impl Moved {
    /// Insists that the machine moved, and that its memory was compared.
    #[track_caller]
    pub fn completed(&self) -> &Self {
        assert_eq!(self.report["outcome"], "completed", "{:#}", self.report);
        assert_eq!(self.report["digest_verified"], true, "{:#}", self.report);
        assert_eq!(self.status, Some(0), "{:#}", self.report);
        self
    }

    /// Insists that the machine stayed at the source, with this outcome and these words in the reason.
    #[track_caller]
    pub fn stayed(&self, outcome: &str, words: &[&str]) -> &Self {
        assert_eq!(self.report["outcome"], outcome, "{:#}", self.report);
        assert_eq!(self.report["machine"], "runs_at_source", "{:#}", self.report);
        assert_eq!(self.status, Some(1), "{:#}", self.report);
        assert!(!self.reason().contains('\n'), "{}", self.reason());
        for word in words {
            assert!(self.reason().contains(word), "`{word}` is not in: {}", self.reason());
        }
        self
    }

    /// The reason, in words.
    pub fn reason(&self) -> &str {
        self.report["reason"].as_str().expect("a reason")
    }
}
