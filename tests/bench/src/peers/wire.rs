//! What joins the two hosts of a run, and how many bytes went over it.

use std::process::Command;

use ferry_e2e::network::{ADDRESSES, Network};
use ferry_faults::cable::Harm;
use ferry_faults::relay::Relay;
use serde_json::Value;

use crate::Failure;
use crate::cases::Link;

/// Two hosts' network, until this is dropped.
pub(crate) struct Wire {
    /// What carries a cable that is long: a relay, the same for all.
    _carrier: Option<Relay>,
    network: Network,
    loopback: bool,
}

/// Bytes of a packet of a long cable: its carrier is to take little of the CPU.
const LONG_MTU: u32 = 9000;

impl Wire {
    pub(crate) fn new(link: &Link) -> Result<Self, Failure> {
        let loopback = link.bits_per_s.is_none();
        let network = match link.round_trip_ms {
            _ if loopback => Network::loopback(),
            0 => Network::new(),
            _ => Network::apart(LONG_MTU),
        };
        let network = network.ok_or("no network namespaces can be made here (as root?)")?;
        let mut carrier = None;
        if link.round_trip_ms > 0 {
            let bits_per_s = link.bits_per_s.unwrap_or(0);
            let harm = Harm { delay_ms: link.round_trip_ms / 2, bits_per_s, ..Harm::NONE };
            let relay = Relay::new(&network, 1);
            relay.set(harm, harm);
            carrier = Some(relay);
        } else if !loopback && let Some(why) = network.shape(link.tc) {
            return Err(format!("no link of {} can be made: {why}", link.what).into());
        }
        Ok(Self { _carrier: carrier, network, loopback })
    }

    /// What runs a command at `end`.
    pub(crate) fn at(&self, end: usize) -> Vec<String> {
        self.network.at(if self.loopback { 0 } else { end })
    }

    /// The address of `end`.
    pub(crate) fn address(&self, end: usize) -> &'static str {
        if self.loopback { "127.0.0.1" } else { ADDRESSES[end] }
    }

    /// Bytes that went over it so far, headers included, both ways.
    pub(crate) fn bytes(&self) -> Result<u64, Failure> {
        let device = if self.loopback { "lo" } else { "cable" };
        let namespace = self.network.file(0);
        let namespace = namespace.file_name().unwrap_or_default();
        let mut ip = Command::new("ip");
        ip.arg("-n").arg(namespace).args(["-s", "-j", "link", "show", "dev", device]);
        let said = ip.output()?;
        let all: Value = serde_json::from_slice(&said.stdout)?;
        let of = |way: &str| all[0]["stats64"][way]["bytes"].as_u64();
        // What is sent over a loopback is received there as well.
        match (of("tx"), of("rx")) {
            (Some(tx), Some(_)) if self.loopback => Ok(tx),
            (Some(tx), Some(rx)) => Ok(tx + rx),
            _ => Err(format!("`ip` does not tell the bytes of {device}: {all}").into()),
        }
    }
}
