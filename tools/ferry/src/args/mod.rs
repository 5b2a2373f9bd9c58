//! The command line.

mod moves;
mod units;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ferry_refvmm::DirtyLog;

use units::{parse_bytes, parse_limit};

pub(crate) use moves::{
    Destination, ListenArg, Migrate, ModeArg, PeerArg, PreflightArgs, ServeSpool, Tune, Way,
};
pub(crate) use units::Limit;

/// Live migration of KVM machines.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, about, long_about = None, propagate_version = true)]
pub(crate) struct Cli {
    /// Where running machines are found. Two directories are two hosts on one machine
    /// [default: $XDG_RUNTIME_DIR/ferry, or /run/ferry].
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start two hosts here, move a busy guest from one to the other, and print the report.
    #[command(after_help = "Example:\n  ferry demo\n  ferry demo --guest process --json")]
    Demo(Demo),
    /// Make the private authority and the identities that hosts know each other by.
    #[command(subcommand)]
    Pki(Pki),
    /// Run and control machines on this host.
    #[command(subcommand)]
    Vm(Vm),
    /// Show what hosts can show guests of their processors, and what several have in common.
    #[command(subcommand)]
    Cpu(Cpu),
    /// Take in machines, and go on running them.
    #[command(
        after_help = "Example:\n  ferry receive --listen 0.0.0.0:7000 --identity pki/host2 --serial console.log\n  \
                      ferry receive --listen 0.0.0.0:7000 --identity pki/host2 --allow /etc/ferry/allow\n\n\
                      A line of the file that --allow names is a host, by its name or its certificate's fingerprint, and the machines \
                      that it may send:\n  \
                      host1         *\n  \
                      host3         web1 web2\n  \
                      sha256:3f2a…  db1      # openssl x509 -in cert.pem -noout -fingerprint -sha256\n\n\
                      It is read for each machine that comes; what is under way is not touched by it."
    )]
    Receive(Receive),
    /// Move a running machine to another host.
    #[command(
        after_help = "Example:\n  ferry migrate web1 --to 10.0.0.2:7000 --identity pki/host1 --max-downtime 20ms\n\n\
                      Exit status: 0 the machine runs at the destination, its memory the same as far as was compared; 1 it does not run there; \
                      2 the command line is wrong; 3 it runs there, but its memory is not the same."
    )]
    Migrate(Migrate),
    /// Say what a move would come to, without moving the machine.
    #[command(
        after_help = "Example:\n  ferry preflight web1 --to 10.0.0.2:7000 --identity pki/host1 --max-downtime 20ms\n\n\
                      The destination is asked for everything, as for a move; for a fifth of a second some pages are sent, and the guest's \
                      writes are counted.\n\n\
                      Exit status: 0 a move would meet its goals; 1 it would not, or is refused; 2 the command line is wrong."
    )]
    Preflight(PreflightArgs),
    /// Save a machine to a bundle: a directory that can be copied, and started elsewhere.
    #[command(after_help = "Example:\n  ferry save web1 /backup/web1-monday\n  \
                      ferry save web1 /backup/web1-tuesday --base /backup/web1-monday\n\n\
                      The guest runs on, but for a stop of milliseconds. A bundle that is there is replaced when the new one is \
                      on the disk.")]
    Save(Save),
    /// Start a machine from a bundle, and host it until it ends or moves away.
    #[command(
        after_help = "Example:\n  ferry restore /backup/web1-monday web1 --serial console.log\n  \
                      ferry restore /backup/web1-monday web1 --lazy\n  \
                      ferry restore ferry://192.0.2.1:7001/web1-monday web1 --lazy --identity pki/host2\n\n\
                      It is a new machine with the memory and state of the one that was saved. If that one still runs, it is \
                      a clone of it.\n\n\
                      With --lazy the bundle is needed until all pages are here, which is said. Saving over it or deleting it \
                      does no harm; what is damaged in it is never given to the guest."
    )]
    Restore(Restore),
    /// Look at bundles, and lend them to other hosts.
    #[command(subcommand)]
    Bundle(Bundle),
    /// Let machines have more memory in all than this host has.
    #[command(subcommand)]
    Memory(Memory),
    /// Serve the memory of a Firecracker snapshot page by page, while its machine runs.
    #[command(
        after_help = "Example:\n  ferry pager --socket /run/fc1.uffd --memory /snapshots/fc1/memory\n  \
                      ferry pager --socket /run/fc1.uffd --bundle /backup/fc1\n  \
                      ferry pager --socket /run/fc1.uffd --bundle ferry://192.0.2.1:7001/fc1 --identity pki/host2\n\n\
                      Start it, then load the snapshot in Firecracker with\n  \
                      \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/fc1.uffd\"}\n\n\
                      One pager serves one machine, until its memory is all loaded or it ends. SIGTERM loads the rest first; a \
                      second one ends the machine. A pager that is killed leaves a machine that hangs.\n\n\
                      Exit status: 0 the machine needs no pager any more; 1 it was ended for want of a page, or none came."
    )]
    Pager(Pager),
    /// Finish a move whose source ended after the hand-over, with the pages of its spool.
    #[command(after_help = "Example:\n  \
                            ferry migrate web1 --to 192.0.2.7:7000 --identity /etc/ferry/pki/host-a --spool /var/spool/ferry/web1\n  \
                            (the process that hosted web1 here dies; web1 runs at 192.0.2.7 and waits for pages)\n  \
                            ferry serve-spool /var/spool/ferry/web1 --to 192.0.2.7:7000 --identity /etc/ferry/pki/host-a\n\n\
                            Exit status: 0 all pages are there; 1 they are not, and the spool is kept; 3 memory differs: stop the machine.")]
    ServeSpool(ServeSpool),
    /// Have a running guest give memory back to this host, or take it again; show how it uses its memory.
    #[command(
        after_help = "Example:\n  ferry balloon web1 --target 512M    (a machine of 1G gives 512M back)\n  \
                      ferry balloon web1 --target 1G      (and takes it again)\n  ferry balloon web1\n\n\
                      The guest gives what it does not need; it needs a driver for it (Linux: virtio_balloon). Memory in huge \
                      pages is given back in whole ones.\n\n\
                      Exit status: 0 the guest has what it shall have, or --no-wait; 1 it stands still before that, or was not \
                      asked; 2 the command line is wrong."
    )]
    Balloon(Balloon),
    /// Change the goals or the bandwidth of a move under way.
    #[command(after_help = "Example:\n  ferry tune web1 --max-downtime 200ms --bandwidth none\n\n\
                            What is not named stays as it is. After the hand-over only the bandwidth counts.")]
    Tune(Tune),
    /// End the migration or the save of a machine; it goes on here. Nothing changes once it is handed over.
    #[command(after_help = "Example:\n  ferry cancel web1")]
    Cancel {
        /// The machine.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// The guest: a KVM machine, or memory and threads of a process. The default is KVM where
    /// /dev/kvm opens.
    #[arg(long, value_enum)]
    pub(crate) guest: Option<DemoGuest>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoGuest {
    Kvm,
    Process,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Pki {
    /// Make an authority in DIR, and an identity DIR/NAME for each host. An authority that is there is
    /// kept, so that hosts can be added.
    #[command(after_help = "Example:\n  ferry pki init pki --host host1 --host host2")]
    Init {
        /// Where.
        dir: PathBuf,
        /// A host to make an identity for; may be repeated [default: host].
        #[arg(long = "host", value_name = "NAME")]
        hosts: Vec<String>,
        /// Days that the identities are valid.
        #[arg(long, value_name = "DAYS", default_value_t = 730, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
    /// Give hosts a new key and certificate in place of the old, which the authority in DIR signs.
    #[command(after_help = "Example:\n  ferry pki renew pki --host host1\n\n\
                      What runs with that identity uses the new one for new connections as soon as it is in its directory; \
                      connections that there are stay. On another host, replace all files of the identity's directory.\n\n\
                      To change to another authority: add its authority.pem to those of all hosts, give each host an identity \
                      of it, and then remove the old one from them.")]
    Renew {
        /// Where `ferry pki init` made them.
        dir: PathBuf,
        /// The host; may be repeated.
        #[arg(long = "host", value_name = "NAME", required = true)]
        hosts: Vec<String>,
        /// Days that the identities are valid.
        #[arg(long, value_name = "DAYS", default_value_t = 730, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// Boot a machine and host it until it ends or moves away.
    #[command(after_help = "Examples:\n  \
        ferry vm run web1 --kernel vmlinux --initrd initrd.gz --cmdline console=ttyS0 --memory 1G --cpus 2\n  \
        ferry vm run test1 --kernel :guest --cmdline 'pattern=random rate=10000' --memory 512M --cpus 2\n  \
        ferry vm run web2 --kernel vmlinux --cpu fleet.json    (see `ferry cpu baseline --help`)\n\n\
        Instead of a file, --kernel takes `:guest`, the test guest that checks its own memory, or \
        `:process`, the same as a process without KVM; --cmdline is then their workload.")]
    Run(Box<Run>),
    /// List the machines of this host.
    #[command(after_help = "Example:\n  ferry vm list --json")]
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show one machine.
    #[command(after_help = "Example:\n  ferry vm show web1 --json")]
    Show {
        /// The machine.
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stop a machine's vCPUs until it is resumed.
    #[command(after_help = "Example:\n  ferry vm pause web1")]
    Pause {
        /// The machine.
        name: String,
    },
    /// Let a paused machine go on.
    #[command(after_help = "Example:\n  ferry vm resume web1")]
    Resume {
        /// The machine.
        name: String,
        /// For a machine that stays paused because a migration lost its destination after the run
        /// permit was sent: you have made sure that the destination does not run it (powered off,
        /// process gone). If you are wrong, the machine runs twice.
        #[arg(long)]
        destination_is_dead: bool,
    },
    /// End a machine, as by pulling its plug.
    #[command(after_help = "Example:\n  ferry vm stop web1")]
    Stop {
        /// The machine.
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Cpu {
    /// Print what this host can show guests of its processor, as JSON.
    #[command(
        after_help = "Example:\n  ferry cpu show > host-a.json\n  ferry cpu show | jq -r '.features[]'\n  \
                            ferry cpu show --of web1\n\n\
                            Features have the names of /proc/cpuinfo, those of IA32_ARCH_CAPABILITIES the names that QEMU gives them; \
                            one without a name is cpuid.LEAF.SUBLEAF.REGISTER.BIT."
    )]
    Show {
        /// Of this machine: what it was shown, and needs wherever it goes.
        #[arg(long, value_name = "NAME")]
        of: Option<String>,
    },
    /// Print what all of these hosts can show, as JSON: a machine that is shown no more can move between all of them.
    #[command(
        after_help = "Example:\n  ferry cpu baseline host-a.json host-b.json > fleet.json\n  \
                            ferry vm run web1 --cpu fleet.json --kernel vmlinux --memory 1G\n\n\
                            Features that not all have are left out, and named. Of numbers, such as bits of an address, it is the \
                            least, and the oldest model. What XSAVE writes to another place on some is left out, too.\n\n\
                            Exit status: 0 printed; 1 there is none (another vendor; rates of time-stamp counters that differ, and \
                            that a host cannot scale), or a file is none."
    )]
    Baseline {
        /// What `ferry cpu show` or `ferry cpu baseline` printed.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The machine's name: letters, digits, `.`, `_`, `-`.
    pub(crate) name: String,
    /// A PVH ELF64, `vmlinux` or `bzImage`; or `:guest` or `:process` (see below).
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "S", default_value = "")]
    pub(crate) cmdline: String,
    /// Guest memory, such as 512M or 4G.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_bytes)]
    pub(crate) memory: u64,
    /// Have the memory in huge pages of 2 MiB, which the host has reserved (sysctl vm.nr_hugepages).
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,
    /// Show the guest no more of the processor than this file says, which `ferry cpu` made [default: all that this host
    /// can show].
    #[arg(long, value_name = "FILE")]
    pub(crate) cpu: Option<PathBuf>,
    /// Append the serial console to FILE instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) serial: Option<PathBuf>,
    /// Most of this host's memory that the machine may use, its pool included, from its first instruction on;
    /// `ferry memory limit` changes it.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, requires = "swap_pool")]
    pub(crate) memory_limit: Option<u64>,
    #[command(flatten)]
    pub(crate) swap: SwapArgs,
    /// How writes are tracked while the machine moves.
    #[arg(long, value_enum, default_value_t = DirtyLogArg::Auto)]
    pub(crate) dirty_log: DirtyLogArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DirtyLogArg {
    /// KVM's bitmap.
    Bitmap,
    /// KVM's dirty ring.
    Ring,
    /// userfaultfd write protection.
    WriteProtect,
    /// The best that the host has.
    Auto,
}

impl From<DirtyLogArg> for DirtyLog {
    fn from(arg: DirtyLogArg) -> Self {
        match arg {
            DirtyLogArg::Bitmap => Self::Bitmap,
            DirtyLogArg::Ring => Self::Ring,
            DirtyLogArg::WriteProtect => Self::WriteProtect,
            DirtyLogArg::Auto => Self::Auto,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SandboxArg {
    /// As far as the kernel can; what it cannot is said.
    Auto,
    /// Not at all where not all of it can be had.
    Require,
    /// As `require`; and a system call that it gave up ends the process, and the machines in it.
    Strict,
    /// No.
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct Receive {
    #[command(flatten)]
    pub(crate) listen: ListenArg,
    /// This host's identity: a directory that `ferry pki init` made.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
    /// Name of the machine here [default: its name at the source].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Append the serial console to FILE instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) serial: Option<PathBuf>,
    /// A bundle, or a directory of bundles: of a machine that comes back, only the pages that differ from its
    /// newest bundle there are sent. May be given more than once.
    #[arg(long, value_name = "DIR")]
    pub(crate) bundles: Vec<PathBuf>,
    /// A directory that commands on machines here may use later: for `ferry save` and its base, for a spool, for
    /// swap. Others cannot be used, as this process gives up the rest of the file system. May be given more than
    /// once.
    #[arg(long, value_name = "DIR")]
    pub(crate) files: Vec<PathBuf>,
    /// Whether this process gives up what it does not need before it listens.
    #[arg(long, value_enum, default_value_t = SandboxArg::Auto)]
    pub(crate) sandbox: SandboxArg,
    #[command(flatten)]
    pub(crate) swap: SwapArgs,
    /// Which hosts may send which machines (see below) [default: all hosts with an identity of the same authority, all
    /// machines].
    #[arg(long, value_name = "FILE")]
    pub(crate) allow: Option<PathBuf>,
    /// Most memory of machines that are on their way in at once [default: what is available].
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) max_memory: Option<u64>,
    /// Take in no machine that was shown more of a processor than this file says, which `ferry cpu` made: it could not
    /// move on to where that is missing.
    #[arg(long, value_name = "FILE")]
    pub(crate) cpu: Option<PathBuf>,
    /// Take in one machine, and exit when it ends.
    #[arg(long)]
    pub(crate) once: bool,
    /// Have memory here in huge pages of 2 MiB, which this host has reserved (sysctl vm.nr_hugepages), whatever
    /// it was in before.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// How writes are tracked when a machine that arrived here moves on.
    #[arg(long, value_enum, default_value_t = DirtyLogArg::Auto)]
    pub(crate) dirty_log: DirtyLogArg,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The machine.
    pub(crate) name: String,
    /// The bundle: a new directory, an empty one, or a bundle to be replaced.
    pub(crate) dir: PathBuf,
    /// Store only what changed since this bundle of the same machine.
    #[arg(long, value_name = "DIR")]
    pub(crate) base: Option<PathBuf>,
    /// End the machine once its bundle is on the disk.
    #[arg(long)]
    pub(crate) stop: bool,
    /// Do not save if the guest, which runs on, would stand still for longer than this.
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = humantime::parse_duration)]
    pub(crate) max_stop: Duration,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Balloon {
    /// The machine.
    pub(crate) name: String,
    /// Memory that the guest shall have, such as 512M; it gives the rest of its machine's memory back. Without it,
    /// only show.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) target: Option<u64>,
    /// Do not wait until the guest has done it.
    #[arg(long, requires = "target")]
    pub(crate) no_wait: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The bundle: a directory, or `ferry://HOST:PORT/NAME` where `ferry bundle serve` lends it.
    #[arg(value_name = "BUNDLE")]
    pub(crate) dir: PathBuf,
    /// The machine's name here.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) places: Places,
    /// Run at once: read each page when it is touched, and all others in the background. The machine
    /// cannot be saved or moved until all are here. Needs access to userfaultfd.
    #[arg(long)]
    pub(crate) lazy: bool,
    /// Append the serial console to FILE instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) serial: Option<PathBuf>,
    /// Have memory here in huge pages of 2 MiB, which this host has reserved (sysctl vm.nr_hugepages), whatever
    /// it was in before.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// How writes are tracked when the machine moves or is saved.
    #[arg(long, value_enum, default_value_t = DirtyLogArg::Auto)]
    pub(crate) dirty_log: DirtyLogArg,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bundle {
    /// Show what a bundle is. Pages are not read.
    #[command(after_help = "Example:\n  ferry bundle info /backup/web1-monday --json")]
    Info(OneBundle),
    /// Read and check all that a restore would read, the bases included.
    #[command(after_help = "Example:\n  ferry bundle verify /backup/web1-tuesday")]
    Verify(OneBundle),
    /// Make a bundle independent of its bases; it keeps its id, and bundles that are based on it.
    #[command(after_help = "Example:\n  ferry bundle merge /backup/web1-tuesday\n  \
                            ferry bundle merge /backup/web1-tuesday --into /backup/web1-full")]
    Merge {
        #[command(flatten)]
        bundle: OneBundle,
        /// Write the merged bundle here; the bundle itself stays as it is.
        #[arg(long, value_name = "DIR")]
        into: Option<PathBuf>,
    },
    /// Lend bundles to other hosts, which read them as `ferry://HOST:PORT/NAME`.
    #[command(
        after_help = "Example:\n  host1$ ferry bundle serve /backup --listen 0.0.0.0:7001 --identity pki/host1\n  \
                      host2$ ferry restore ferry://192.0.2.1:7001/web1-monday web1 --lazy --identity pki/host2\n\n\
                      NAME is a bundle's directory, seen from DIR; a bundle may be DIR itself: then there is no NAME. Every host \
                      with an identity of the same authority can read all bundles below DIR, and nothing else, unless --allow \
                      says which host may read which. It ends when it is interrupted; who reads then waits for it to come back.\n\n\
                      A line of the file that --allow names is a host, by its name or its certificate's fingerprint, and the bundles \
                      that it may read, the bases of each included:\n  \
                      host2         *\n  \
                      sha256:3f2a…  web1-monday web1-tuesday"
    )]
    Serve(BundleServe),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BundleServe {
    /// A bundle, or a directory of bundles.
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) listen: ListenArg,
    /// This host's identity: a directory that `ferry pki init` made.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: PathBuf,
    /// Which hosts may read which bundles (see below) [default: all hosts with an identity of the same authority, all
    /// bundles].
    #[arg(long, value_name = "FILE")]
    pub(crate) allow: Option<PathBuf>,
    /// Whether this process gives up what it does not need before it listens.
    #[arg(long, value_enum, default_value_t = SandboxArg::Auto)]
    pub(crate) sandbox: SandboxArg,
}

/// Where cold pages go.
#[derive(Debug, Args)]
pub(crate) struct SwapArgs {
    /// Most memory of this host that compressed pages of a machine may take, such as 256M.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) swap_pool: Option<u64>,
    /// A directory on a disk, for a file that takes what the pool cannot.
    #[arg(long, value_name = "DIR", requires_all = ["swap_pool", "swap_size"])]
    pub(crate) swap_dir: Option<PathBuf>,
    /// Most that the file may take, such as 4G.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, requires = "swap_dir")]
    pub(crate) swap_size: Option<u64>,
}

impl SwapArgs {
    pub(crate) fn options(&self) -> Option<ferry_swap::Options> {
        Some(ferry_swap::Options {
            pool_bytes: self.swap_pool?,
            dir: self.swap_dir.clone(),
            file_bytes: self.swap_size.unwrap_or(0),
        })
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Memory {
    /// Say whether a host can hold the machines of a plan, and what each gets.
    #[command(after_long_help = concat!(
        "Example:\n  ferry memory plan host1.toml\n  ferry memory plan host1.toml --json\n\n",
        "Exit status: 0 it can be held whatever the guests do; 1 it cannot, or FILE is no plan. The reason is said with its \
         numbers.\n\nA plan:\n\n",
        include_str!("../../../../memory/overcommit/example.toml")
    ))]
    Plan {
        /// A plan: a TOML file.
        file: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Keep the machines of a plan within its budget, until this is stopped: they run on as they are then.
    #[command(
        after_help = "Example:\n  ferry memory run host1.toml\n  ferry memory run host1.toml --once --json\n\n\
                      Machines of the plan that do not run yet are waited for. A machine keeps what it was last allowed when \
                      this ends, however it ends.\n\n\
                      Exit status: 0 stopped, or --once; 1 the plan cannot be held, or FILE is no plan."
    )]
    Run {
        /// A plan: a TOML file; see `ferry memory plan --help`.
        file: PathBuf,
        /// Do one step, and end.
        #[arg(long)]
        once: bool,
        /// Print each step as one JSON object on a line.
        #[arg(long)]
        json: bool,
    },
    /// Keep a machine within so much of this host's memory: its cold pages are compressed, and go to a file at last.
    #[command(
        after_help = "Example:\n  ferry memory limit web1 512M --swap-pool 128M --swap-dir /var/tmp --swap-size 2G\n  \
                      ferry memory limit web1 none\n\n\
                      The pool counts as memory of the machine. What is in pool and file comes back when it is touched, \
                      and is moved as it is when the machine moves."
    )]
    Limit {
        /// The machine.
        name: String,
        /// Such as 512M, or none.
        #[arg(value_parser = parse_limit)]
        limit: Limit,
        #[command(flatten)]
        swap: SwapArgs,
    },
    /// Look for equal pages in machines, and have the kernel merge them, once and now.
    #[command(
        after_help = "Example:\n  ferry memory share web1 web2\n  ferry memory share web1 --tenant alice --json\n\n\
                      It takes some seconds: only pages that the guests leave alone meanwhile are looked at. What is merged \
                      stays so until it is written. `ferry memory run` does the same by itself when memory is short.\n\n\
                      Exit status: 0 done; 1 a machine cannot be looked at, or the kernel does not merge. The reason is said."
    )]
    Share {
        /// The machines; their pages are compared with each other, too.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
        /// Whose they are. Pages of different tenants are not merged [default: whose they were].
        #[arg(long)]
        tenant: Option<String>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run three machines of 3 units in 6 units of memory, kill what manages them, and print what became of them.
    #[command(
        after_help = "Example:\n  ferry memory demo\n  ferry memory demo --process --unit 128M --json\n\n\
                      The machines run first with memory enough for all, and that is what their speed is compared with; then \
                      in a control group that may have no more than 6 units. Making one takes root, or \
                      `systemd-run --user --scope -p Delegate=yes`.\n\n\
                      Exit status: 0 all is as it should be; 1 it is not, or could not be tried."
    )]
    Demo(MemoryDemo),
    /// Show how the machines of this host use its memory, and what they save.
    #[command(after_help = "Example:\n  ferry memory report\n  ferry memory report --json")]
    Report {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MemoryDemo {
    /// A third of a machine, a sixth of the budget [default: what suits this host and is done within a minute].
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) unit: Option<u64>,
    /// Process guests (memory and threads, no KVM) even where /dev/kvm opens.
    #[arg(long)]
    pub(crate) process: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Pager {
    /// The socket that Firecracker is told as `backend_path`. It is made, and removed once the machine has
    /// come.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// The memory file that Firecracker wrote with the snapshot.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "bundle",
        conflicts_with_all = ["bundle", "bases", "identity"]
    )]
    pub(crate) memory: Option<PathBuf>,
    /// A bundle with the same memory, lowest page first: a directory, or `ferry://HOST:PORT/NAME` where
    /// `ferry bundle serve` lends it.
    #[arg(long, value_name = "BUNDLE")]
    pub(crate) bundle: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) places: Places,
    /// Load only what the machine touches: it takes less memory, and needs the pager for as long as it runs.
    #[arg(long)]
    pub(crate) on_demand: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is needed to find all of a bundle.
#[derive(Debug, Args)]
pub(crate) struct Places {
    /// Where to look for bases that are not where the bundle expects them; may be repeated.
    #[arg(long = "base", value_name = "BUNDLE")]
    pub(crate) bases: Vec<PathBuf>,
    /// This host's identity, for bundles of other hosts: a directory that `ferry pki init` made.
    #[arg(long, value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) peer: PeerArg,
}

#[derive(Debug, Args)]
pub(crate) struct OneBundle {
    /// The bundle: a directory, or `ferry://HOST:PORT/NAME` where `ferry bundle serve` lends it.
    #[arg(value_name = "BUNDLE")]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) places: Places,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
