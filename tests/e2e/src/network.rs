//! Two network namespaces joined by a cable that can be cut.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// The addresses of the two ends.
pub const ADDRESSES: [&str; 2] = ["10.77.77.1", "10.77.77.2"];

/// Those of a second cable.
pub const SECOND: [&str; 2] = ["10.78.78.1", "10.78.78.2"];

/// Two namespaces; they go with this.
#[derive(Debug)]
pub struct Network([String; 2]);

/// Why a command did not succeed, in words.
pub fn why_not(tried: io::Result<Output>) -> Option<String> {
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(e) => Some(e.to_string()),
    }
}

fn ip(words: &str) -> Option<String> {
    why_not(Command::new("ip").args(words.split_whitespace()).output())
        .map(|why| format!("`ip {words}`: {why}"))
}

/// What makes a cable between two namespaces.
fn cable([a, b]: &[String; 2], name: &str, addresses: [&str; 2]) -> Vec<String> {
    let mut commands = vec![format!("-n {a} link add {name} type veth peer name {name} netns {b}")];
    for (end, address) in [a, b].iter().zip(addresses) {
        commands.push(format!("-n {end} address add {address}/24 dev {name}"));
        commands.push(format!("-n {end} link set {name} up"));
    }
    commands
}

impl Network {
    /// None, with a word on standard output, where this is not permitted.
    pub fn new() -> Option<Self> {
        Self::made(|ends| cable(ends, "cable", ADDRESSES))
    }

    /// The same with a second cable, `cable2`.
    pub fn of_two_cables() -> Option<Self> {
        Self::made(|ends| [cable(ends, "cable", ADDRESSES), cable(ends, "cable2", SECOND)].concat())
    }

    /// The same with a cable of which each end is a device (TUN): what shall pass from one to the other has to be
    /// carried. None, with a word, as above.
    pub fn apart(mtu: u32) -> Option<Self> {
        Self::made(|names| {
            let mut commands = Vec::new();
            for (end, address) in names.iter().zip(ADDRESSES) {
                commands.push(format!("-n {end} tuntap add dev cable mode tun"));
                commands.push(format!("-n {end} address add {address}/24 dev cable"));
                // A burst of a whole congestion window fits: what is lost, the carrier loses.
                commands.push(format!("-n {end} link set cable up mtu {mtu} txqueuelen 20000"));
            }
            commands
        })
    }

    /// Two namespaces without a cable, the first with a loopback as every host has it. None, with a word, as
    /// above.
    pub fn loopback() -> Option<Self> {
        Self::made(|[first, _]| vec![format!("-n {first} link set lo up")])
    }

    fn made(commands: impl FnOnce(&[String; 2]) -> Vec<String>) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let network = Self(["a", "b"].map(|end| format!("ferry-{id}-{end}")));
        let mut all: Vec<String> = network.0.iter().map(|n| format!("netns add {n}")).collect();
        all.extend(commands(&network.0));
        if let Some(why) = all.iter().find_map(|words| ip(words)) {
            println!("SKIP: no network of two hosts can be made: {why}");
            return None;
        }
        Some(network)
    }

    /// The file by which a thread enters the namespace of `end`.
    pub fn file(&self, end: usize) -> PathBuf {
        Path::new("/run/netns").join(&self.0[end])
    }

    /// What runs a command at one end.
    pub fn at(&self, end: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.0[end]].map(str::to_owned).into()
    }

    /// Gives `end` another address, and takes its old one; the new one.
    pub fn renumber(&self, end: usize) -> &'static str {
        let new = ["10.77.77.3", "10.77.77.4"][end];
        let name = &self.0[end];
        assert_eq!(ip(&format!("-n {name} address del {}/24 dev cable", ADDRESSES[end])), None);
        assert_eq!(ip(&format!("-n {name} address add {new}/24 dev cable")), None);
        new
    }

    /// Lets no more than `rate` through, each way; why not, if so.
    pub fn shape(&self, rate: &str) -> Option<String> {
        self.shape_cable("cable", rate)
    }

    /// The same for `cable`.
    pub fn shape_cable(&self, cable: &str, rate: &str) -> Option<String> {
        let words = format!("qdisc add dev {cable} root tbf rate {rate} burst 128kb latency 5ms");
        self.0.iter().find_map(|name| {
            let args = ["-n", name].into_iter().chain(words.split_whitespace());
            why_not(Command::new("tc").args(args).output())
        })
    }

    /// Bytes that left the first end by `cable` so far.
    pub fn carried(&self, cable: &str) -> u64 {
        let at = self.at(0);
        let file = format!("/sys/class/net/{cable}/statistics/tx_bytes");
        let read = Command::new(&at[0]).args(&at[1..]).args(["cat", &file]).output();
        let read = String::from_utf8(read.expect("it runs").stdout).expect("text");
        read.trim().parse().expect("a number")
    }

    /// `down` cuts the cable, `up` joins it.
    pub fn set_link(&self, state: &str) {
        assert_eq!(ip(&format!("-n {} link set cable {state}", self.0[0])), None);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for end in &self.0 {
            // It may not have been made.
            let _ = ip(&format!("netns delete {end}"));
        }
    }
}
