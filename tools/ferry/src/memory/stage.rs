//! What a demo runs on: machines, each in a process of its own, all in one control group.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::cgroup::{Cgroup, Hierarchy, Usage};
use crate::protocol::{MachineInfo, Request};
use crate::runtime_dir::RuntimeDir;
use crate::vm;

/// What takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(200);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Has Ctrl-C and SIGTERM end a demo by an error, so that it takes away what it made.
pub(super) fn mind_signals() -> Result<(), Failure> {
    extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        vmm_sys_util::signal::register_signal_handler(signal, note)?;
    }
    Ok(())
}

/// A process that does not outlive the demo. It does not hear what the terminal sends: the demo ends it.
pub(super) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(command: &mut Command, log: PathBuf) -> Result<Self, Failure> {
        command.stdout(Stdio::null()).stderr(File::create(&log)?).process_group(0);
        Ok(Self { child: command.spawn()?, log })
    }

    /// An error, with its last words, if it has ended.
    pub(super) fn must_run(&mut self, who: &str) -> Result<(), Failure> {
        let Some(how) = self.child.try_wait()? else { return Ok(()) };
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        Err(Failure::words(format!("{who} ended too early ({how}): {}", said.trim_end())))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A host with its own runtime directory.
pub(super) struct Stage {
    runtime: RuntimeDir,
    dir: PathBuf,
    /// Here until it is dropped.
    group: Option<Cgroup>,
    machines: Vec<(String, Process)>,
}

impl Stage {
    /// One in `dir`, whose machines may use `limit_bytes` of memory in all, with what runs them.
    pub(super) fn new(
        dir: &Path,
        hierarchy: &Hierarchy,
        limit_bytes: u64,
    ) -> Result<Self, Failure> {
        let runtime = RuntimeDir::open(Some(dir.to_owned()))?;
        let name = dir.file_name().unwrap_or_default().display();
        let group =
            hierarchy.make(&format!("ferry-demo-{}-{name}", std::process::id()), limit_bytes)?;
        Ok(Self { runtime, dir: dir.to_owned(), group: Some(group), machines: Vec::new() })
    }

    /// Starts `ferry vm run NAME` with `args`: it is in the group before it takes any memory.
    pub(super) fn run<A: AsRef<OsStr>>(&mut self, name: &str, args: &[A]) -> Result<(), Failure> {
        let mut command = Command::new("sh");
        command.args(["-c", "read go && exec \"$@\"", "sh"]).stdin(Stdio::piped());
        command.arg(std::env::current_exe()?).arg("--runtime-dir").arg(self.runtime.path());
        command.args(["vm", "run", name]).args(args);
        let mut process = Process::start(&mut command, self.dir.join(format!("{name}.log")))?;
        self.group()?.put(process.child.id())?;
        let mut stdin = process.child.stdin.take().ok_or_else(|| Failure::words("no pipe"))?;
        stdin.write_all(b"go\n")?;
        self.machines.push((name.to_owned(), process));
        Ok(())
    }

    /// Time that CPUs spent on the machines so far, what moves their pages included, in ticks of the clock.
    pub(super) fn cpu_ticks(&self) -> Result<u64, Failure> {
        let mut all = 0;
        for (name, process) in &self.machines {
            let path = format!("/proc/{}/stat", process.child.id());
            let stat = fs::read_to_string(&path)?;
            // Behind the name, which may hold anything: utime and stime are the 14th and 15th of all.
            let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11);
            let times: Result<Vec<u64>, _> = fields.take(2).map(str::parse).collect();
            all += times
                .map_err(|e| Failure::words(format!("{path} of `{name}`: {e}")))?
                .iter()
                .sum::<u64>();
        }
        Ok(all)
    }

    /// Starts `ferry` with `args`, outside of the group.
    pub(super) fn start(&self, args: &[&OsStr], log: &str) -> Result<Process, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--runtime-dir").arg(self.runtime.path()).args(args).stdin(Stdio::null());
        Process::start(&mut command, self.dir.join(log))
    }

    fn group(&self) -> Result<&Cgroup, Failure> {
        self.group.as_ref().ok_or_else(|| Failure::words("no control group"))
    }

    pub(super) fn usage(&self) -> Result<Usage, Failure> {
        Ok(self.group()?.usage()?)
    }

    /// All machines, as they were started; those that do not answer yet are left out. An error if one has ended, or
    /// found a wrong page.
    pub(super) fn look(&mut self) -> Result<Vec<MachineInfo>, Failure> {
        let mut all = Vec::with_capacity(self.machines.len());
        for (name, process) in &mut self.machines {
            process.must_run(&format!("machine `{name}`"))?;
            let Ok(info) = vm::info(&self.runtime, name) else { continue };
            if info.state.starts_with("crashed") || info.state.starts_with("halted") {
                return Err(Failure::words(format!("machine `{name}`: {}", info.state)));
            }
            all.push(info);
        }
        Ok(all)
    }

    /// Looks again and again, until `enough` says so.
    pub(super) fn watch(
        &mut self,
        what: &str,
        mut enough: impl FnMut(&[MachineInfo], Usage) -> bool,
    ) -> Result<Vec<MachineInfo>, Failure> {
        let began = Instant::now();
        loop {
            if INTERRUPTED.load(Ordering::Relaxed) {
                return Err(Failure::words("interrupted: all that was made is taken away"));
            }
            let (all, usage) = (self.look()?, self.usage()?);
            if all.len() == self.machines.len() && enough(&all, usage) {
                return Ok(all);
            }
            if began.elapsed() > PATIENCE {
                return Err(Failure::words(format!("waited {PATIENCE:?} in vain: {what}")));
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Stops all machines; an error if one does not end well.
    pub(super) fn stop(&mut self) -> Result<(), Failure> {
        for (name, process) in &mut self.machines {
            vm::ask_quietly(&self.runtime, name, &Request::Stop)?;
            let how = process.child.wait()?;
            if !how.success() {
                let said = fs::read_to_string(&process.log).unwrap_or_default();
                let said = said.trim_end();
                return Err(Failure::words(format!("machine `{name}` ended by {how}: {said}")));
            }
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.machines.clear();
        let Some(group) = self.group.take() else { return };
        // The kernel takes a moment to forget who was in it.
        std::thread::sleep(LOOK_EVERY);
        if let Err(e) = group.remove() {
            eprintln!("ferry: {}", ferry_migrate::words(&e));
        }
    }
}
