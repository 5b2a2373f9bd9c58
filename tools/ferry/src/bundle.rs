//! `ferry bundle`: shows, checks, merges and lends bundles.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ferry_bundle::{BundleId, Chain, Layer, Sum, VERSION, merge};
use ferry_depot::Network;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use crate::Failure;
use crate::args::{Bundle, OneBundle};
use crate::places;

/// What `bundle info --json` prints.
#[derive(Serialize)]
struct Info<'a> {
    dir: &'a Path,
    version: u32,
    id: BundleId,
    machine: BundleId,
    machine_name: &'a str,
    vmm: &'a str,
    vcpus: u32,
    memory_bytes: u64,
    /// Pages of data that a restore fills, bases included.
    data_pages: u64,
    memory_digest: Sum,
    state_bytes: u64,
    /// The bundle itself, then its bases.
    chain: Vec<Link<'a>>,
}

/// One bundle of a chain.
#[derive(Serialize)]
struct Link<'a> {
    dir: &'a Path,
    id: BundleId,
    saved: String,
    data_pages: u64,
    zero_pages: u64,
    bytes: u64,
}

/// What `bundle verify --json` prints.
#[derive(Serialize)]
struct Checked {
    id: BundleId,
    pages: u64,
    bundles: usize,
    state_bytes: u64,
}

/// What `bundle merge --json` prints.
#[derive(Serialize)]
struct Merged {
    id: BundleId,
    dir: PathBuf,
    data_pages: u64,
    memory_bytes: u64,
}

pub(crate) fn main(command: &Bundle) -> Result<(), Failure> {
    let open = |one: &OneBundle| places::open(&one.dir, &one.places);
    match command {
        Bundle::Info(one) => info(&open(one)?, one),
        Bundle::Verify(one) => verify(&open(one)?, one),
        Bundle::Merge { bundle: one, into } => {
            let into = into.as_ref().unwrap_or(&one.dir);
            if Network::is_remote(into) {
                return Err(Failure::words(
                    "a bundle of another host is not written to: say --into DIR",
                ));
            }
            merged(&open(one)?, one, into)
        }
        Bundle::Serve(args) => places::lend(args),
    }
}

fn print(
    json: bool,
    value: &impl Serialize,
    words: impl FnOnce() -> String,
) -> Result<(), Failure> {
    if json {
        println!("{}", serde_json::to_string_pretty(value)?);
    } else {
        println!("{}", words());
    }
    Ok(())
}

fn link(layer: &Layer) -> Link<'_> {
    let m = &layer.manifest;
    let saved = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(m.saved_unix_s));
    // The formatter's years have four digits.
    let saved = saved.filter(|_| m.saved_unix_s < 253_402_300_800);
    Link {
        dir: &layer.dir,
        id: m.id,
        saved: saved
            .map_or_else(|| "?".into(), |at| humantime::format_rfc3339_seconds(at).to_string()),
        data_pages: m.memory.data_pages,
        zero_pages: m.memory.zero_pages,
        bytes: m.memory.bytes + m.state.bytes,
    }
}

fn info(chain: &Chain, one: &OneBundle) -> Result<(), Failure> {
    let (m, spec) = (chain.manifest(), chain.spec());
    let info = Info {
        dir: &one.dir,
        version: VERSION.min(m.version),
        id: m.id,
        machine: m.machine,
        machine_name: &spec.name,
        vmm: &spec.vmm,
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes(),
        data_pages: chain.data_pages().len(),
        memory_digest: m.memory.digest,
        state_bytes: m.state.bytes,
        chain: chain.layers().iter().map(link).collect(),
    };
    print(one.json, &info, || {
        let mut out = format!(
            "bundle   {} (format version {})\nmachine  `{}`, {}, {} vCPUs, {} MiB\nnumber   {}\nmemory   {} pages of data, digest {}\nstate    {}",
            info.id,
            info.version,
            info.machine_name,
            info.vmm,
            info.vcpus,
            info.memory_bytes >> 20,
            info.machine,
            HumanCount(info.data_pages),
            info.memory_digest,
            HumanBytes(info.state_bytes),
        );
        for (link, what) in
            info.chain.iter().zip(["saved  "].into_iter().chain(std::iter::repeat("base   ")))
        {
            out += &format!(
                "\n{what}  {} {}, {} pages, {}, in {}",
                link.saved,
                link.id,
                HumanCount(link.data_pages),
                HumanBytes(link.bytes),
                link.dir.display()
            );
        }
        out
    })
}

fn verify(chain: &Chain, one: &OneBundle) -> Result<(), Failure> {
    let found = chain.verify()?;
    let id = chain.manifest().id;
    let checked =
        Checked { id, pages: found.pages, bundles: found.bundles, state_bytes: found.state_bytes };
    print(one.json, &checked, || {
        format!(
            "bundle {id} is whole: {} pages in a chain of {}, {} of state",
            HumanCount(found.pages),
            found.bundles,
            HumanBytes(found.state_bytes)
        )
    })
}

fn merged(chain: &Chain, one: &OneBundle, into: &Path) -> Result<(), Failure> {
    let done = merge(chain, into)?;
    let merged = Merged {
        id: done.id,
        dir: into.to_owned(),
        data_pages: done.memory.data_pages,
        memory_bytes: done.memory.bytes,
    };
    print(one.json, &merged, || {
        format!(
            "bundle {} at {} needs no base: {} pages, {}",
            merged.id,
            into.display(),
            HumanCount(merged.data_pages),
            HumanBytes(merged.memory_bytes)
        )
    })
}
