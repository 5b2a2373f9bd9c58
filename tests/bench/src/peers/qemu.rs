//! QEMU as the VMM of a guest: from a Debian tree of its own, in a network namespace, moved by its own protocol.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ferry_e2e::Hosts;
use serde_json::{Value, json};

use crate::Failure;
use crate::cases::{Case, Setting};
use crate::measure::{Ended, Whole};
use crate::qmp::Qmp;
use crate::trace::End;
use crate::watch::{Process, Watch};
use crate::wire::Wire;

/// Where, inside the tree, files are that both sides know.
const INSIDE: &str = "run/peers";
/// Not virtual hardware that the guest has no use for: least state, and least of its downtime.
const MACHINE: &str = "microvm,accel=kvm";
/// The feature is left out as hosts with software paging refuse to set its register.
const CPU: &str = "host,-arch-capabilities";

/// A tree that has QEMU, and the files of a run.
pub(crate) struct Kit {
    tree: PathBuf,
    files: tempfile::TempDir,
    tsc_khz: u32,
}

impl Kit {
    /// `tree` is a Debian with QEMU; it is made if it is not there.
    pub(crate) fn new(tree: &Path, hosts: &Hosts, tsc_khz: u32) -> Result<Self, Failure> {
        install(tree)?;
        fs::create_dir_all(tree.join(INSIDE))?;
        let files = tempfile::tempdir()?;
        fs::write(files.path().join("guest.elf"), ferry_guest::ELF)?;
        let tls = files.path().join("tls");
        fs::create_dir(&tls)?;
        let identity = &hosts.source.identity;
        for (theirs, ours) in [
            ("ca-cert.pem", "authority.pem"),
            ("server-cert.pem", "cert.pem"),
            ("server-key.pem", "key.pem"),
            ("client-cert.pem", "cert.pem"),
            ("client-key.pem", "key.pem"),
        ] {
            let from = identity.join(ours);
            fs::copy(&from, tls.join(theirs)).map_err(|e| format!("{}: {e}", from.display()))?;
        }
        Ok(Self { tree: tree.to_owned(), files, tsc_khz })
    }

    /// QEMU's version, as it says.
    pub(crate) fn version(&self) -> Result<String, Failure> {
        let said = Command::new("chroot")
            .arg(&self.tree)
            .args(["qemu-system-x86_64", "--version"])
            .output()?;
        let text = String::from_utf8_lossy(&said.stdout);
        let line = text.lines().next().ok_or("QEMU does not tell its version")?;
        Ok(line.trim_start_matches("QEMU emulator version ").to_owned())
    }
}

/// Makes the tree, once: Debian as it is now.
fn install(tree: &Path) -> Result<(), Failure> {
    if tree.join("usr/bin/qemu-system-x86_64").exists() {
        return Ok(());
    }
    let parent = tree.parent().ok_or("the tree has no parent")?;
    fs::create_dir_all(parent)?;
    let half = tree.with_extension("unfinished");
    if half.exists() {
        fs::remove_dir_all(&half)?;
    }
    eprintln!("installing QEMU in {} (some minutes, once)", tree.display());
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", "--include=qemu-system-x86", "trixie"]).arg(&half);
    let status = debootstrap.stdout(Stdio::null()).status().map_err(|e| {
        format!(
            "debootstrap cannot be run: {e}; on Debian or Ubuntu: sudo apt-get install debootstrap"
        )
    })?;
    if !status.success() {
        return Err(format!(
            "debootstrap failed ({status}): see {}/debootstrap/debootstrap.log; it needs root and \
             deb.debian.org",
            half.display()
        )
        .into());
    }
    Ok(fs::rename(&half, tree)?)
}

/// A QEMU with a guest, or with room for one.
pub(crate) struct Qemu {
    child: Child,
    qmp: Qmp,
    end: usize,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(
        kit: &Kit,
        wire: &Wire,
        case: &Case,
        end: usize,
        incoming: bool,
    ) -> Result<Self, Failure> {
        let files = kit.files.path();
        let id = format!("{end}-{}", if incoming { "in" } else { "boot" });
        let socket = files.join(format!("qmp-{id}"));
        let _ = fs::remove_file(&socket);
        let said = fs::File::create(files.join(format!("said-{id}")))?;
        let script = format!(
            "mount --rbind /dev \"$0/dev\" && mount -t proc proc \"$0/proc\" && \
             mount --bind \"$1\" \"$0/{INSIDE}\" && tree=$0 && shift && exec chroot \"$tree\" \"$@\""
        );
        let before = wire.at(end);
        let mut command = Command::new(&before[0]);
        command.args(&before[1..]).args([
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "-m",
            "sh",
            "-c",
            &script,
        ]);
        command.arg(&kit.tree).arg(files).arg("qemu-system-x86_64");
        command.args([
            "-machine",
            MACHINE,
            "-cpu",
            CPU,
            "-smp",
            "1",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-name", "m,debug-threads=on"]);
        command.args(["-m", &format!("{}M", case.memory_mib)]);
        command.args(["-kernel", &format!("/{INSIDE}/guest.elf")]);
        command.args(["-append", &format!("cpus=1 tsc_khz={} {}", kit.tsc_khz, case.workload)]);
        command.args(["-serial", &format!("file:/{INSIDE}/serial-{id}")]);
        command.args(["-qmp", &format!("unix:/{INSIDE}/qmp-{id},server=on,wait=off")]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let mut child = command.spawn()?;
        let began = Instant::now();
        let qmp = loop {
            match Qmp::connect(&socket) {
                Ok(qmp) => break qmp,
                Err(_)
                    if began.elapsed() < Duration::from_secs(20) && child.try_wait()?.is_none() =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) => {
                    let _ = child.kill();
                    let why = fs::read_to_string(files.join(format!("said-{id}")))?;
                    return Err(format!("QEMU does not start: {e}: {}", why.trim()).into());
                }
            }
        };
        Ok(Self { child, qmp, end })
    }

    /// Boots the guest of `case`; back when it follows its pattern.
    pub(crate) fn boot(kit: &Kit, wire: &Wire, case: &Case) -> Result<Self, Failure> {
        let qemu = Self::start(kit, wire, case, 0, false)?;
        crate::measure::wait_until_it_works(qemu.child.id(), case)?;
        Ok(qemu)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Prepares both ends; the guest's place at the other one.
    pub(crate) fn prepare(
        &mut self,
        kit: &Kit,
        wire: &Wire,
        case: &Case,
        setting: &Setting,
    ) -> Result<Self, Failure> {
        let mut there = Self::start(kit, wire, case, 1 - self.end, true)?;
        for (qemu, endpoint) in [(&mut *self, "client"), (&mut there, "server")] {
            qemu.configure(setting, endpoint)?;
        }
        there.qmp.execute("migrate-incoming", json!({ "uri": uri(wire, there.end) }))?;
        Ok(there)
    }

    fn configure(&mut self, setting: &Setting, endpoint: &str) -> Result<(), Failure> {
        let state = |name: &str, on: bool| json!({ "capability": name, "state": on });
        let capabilities = json!({ "capabilities": [
            state("events", true),
            state("multifd", setting.channels > 0),
            state("xbzrle", setting.xbzrle),
            state("auto-converge", setting.auto_converge),
            state("postcopy-ram", setting.post_copy),
            state("postcopy-preempt", setting.post_copy),
        ]});
        self.qmp.execute("migrate-set-capabilities", capabilities)?;
        let id = format!("tls-{endpoint}");
        if setting.tls {
            let dir = format!("/{INSIDE}/tls");
            self.qmp.execute("object-add", json!({
                "qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint, "verify-peer": true,
            }))?;
        }
        let mut parameters = json!({
            "max-bandwidth": 1_u64 << 40,
            "downtime-limit": setting.downtime_ms,
            "tls-creds": if setting.tls { id.as_str() } else { "" },
            "tls-hostname": if setting.tls { "a" } else { "" },
            "xbzrle-cache-size": 256 << 20,
            "multifd-compression": if setting.zstd { "zstd" } else { "none" },
        });
        if setting.channels > 0 {
            parameters["multifd-channels"] = setting.channels.into();
        }
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Moves the guest to `there`.
    pub(crate) fn migrate(
        &mut self,
        there: &mut Self,
        wire: &Wire,
        watch: &Watch,
        setting: &Setting,
        most: Duration,
    ) -> Result<Ended, Failure> {
        let began = watch.now();
        let until = Instant::now() + most;
        self.qmp.execute("migrate", json!({ "uri": uri(wire, there.end) }))?;
        if setting.post_copy {
            self.qmp.execute("migrate-start-postcopy", json!({}))?;
        }
        let (mut given_up, mut stopped_us) = (false, 0);
        let ended = loop {
            let until = if given_up { until + Duration::from_secs(60) } else { until };
            let Some(event) = self.qmp.event(until)? else {
                if given_up {
                    return Err("QEMU does not end the migration that was cancelled".into());
                }
                given_up = true;
                // Once it is handed over, there is no way back.
                if let Err(e) = self.qmp.execute("migrate_cancel", json!({})) {
                    return Err(format!("not within {} s; {e}", most.as_secs()).into());
                }
                continue;
            };
            if event.name == "STOP" {
                stopped_us = event.at_us;
            }
            match event.status.as_deref() {
                Some("completed") => break watch.now(),
                Some(status @ ("failed" | "cancelled" | "postcopy-paused")) => {
                    let told = self.qmp.execute("query-migrate", json!({}))?;
                    let why = told["error-desc"].as_str().unwrap_or_default().to_owned();
                    return Err(match given_up {
                        true => format!("not within {} s", most.as_secs()),
                        false => format!("{status}: {why}"),
                    }
                    .into());
                }
                _ => {}
            }
        };
        watch.wait(
            "the guest runs at the destination",
            Duration::from_secs(10),
            Watch::runs_there,
        )?;
        let told = self.qmp.execute("query-migrate", json!({}))?;
        let resumed_us = loop {
            match there.qmp.event(Instant::now() + Duration::from_secs(10))? {
                Some(event) if event.name == "RESUME" => break event.at_us,
                Some(_) => {}
                None => {
                    return Err("QEMU does not say that the guest runs at the destination".into());
                }
            }
        };
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        Ok(Ended {
            began,
            whole: if setting.post_copy { Whole::At(ended) } else { Whole::AtHandOver },
            foretold_ms: None,
            downtime_said_ms: number(&told["downtime"]),
            how: format!(
                "{} rounds, {} requests, {} ms by its own clock, from STOP to RESUME {} µs",
                told["ram"]["dirty-sync-count"],
                told["ram"]["postcopy-requests"],
                told["total-time"],
                resumed_us.saturating_sub(stopped_us)
            ),
        })
    }

    /// The two that take part.
    pub(crate) fn processes(&self, there: &Self) -> [Process; 2] {
        [(self, End::Source), (there, End::Destination)]
            .map(|(qemu, end)| Process { pid: qemu.pid(), end: Some(end) })
    }
}

fn uri(wire: &Wire, end: usize) -> String {
    format!("tcp:{}:4444", wire.address(end))
}
