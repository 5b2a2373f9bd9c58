//! A snapshot's memory: what each page holds, as a memory file, as a bundle, and as one of another host.

#![allow(unreachable_pub, reason = "a module of tests")]

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_bundle::{Chain, Draft};
use ferry_depot::{Depot, Network, PATIENCE, serve};
use ferry_firecracker::Memory;
use ferry_protocol::{DeviceSpec, MachineSpec, StateWriter};
use ferry_transport::{Identity, LinkError, Listener, QuicConnector, QuicListener, pki};
use tokio::runtime::Runtime;

/// Pages of the machine: 6 MiB, then 2 MiB behind a hole.
pub const REGIONS: [u64; 2] = [1536, 512];
pub const PAGES: u64 = 2048;
/// Frames of the bundle's machine: other stretches, with the same pages.
const EXTENTS: [(u64, u64); 3] = [(0, 160), (256, 1500), (1 << 20, 388)];
/// Pages from here on cannot be read when the memory file is damaged.
const DAMAGED: u64 = 2040;

/// What each word of page `page` is; none if it is zero.
pub fn word(page: u64) -> Option<u64> {
    (page % 3 != 1).then(|| (page + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

pub fn data_pages() -> u64 {
    (0..PAGES).filter(|page| word(*page).is_some()).count() as u64
}

fn content(page: u64) -> Option<Vec<u8>> {
    word(page).map(|word| word.to_le_bytes().repeat(512))
}

/// A hand-over of all pages as one region.
pub fn one_region() -> String {
    let size = PAGES * 4096;
    format!(r#"[{{"base_host_virt_addr":1073741824,"size":{size},"offset":0}}]"#)
}

pub struct Snapshot {
    path: PathBuf,
    is_bundle: bool,
    /// The host on which the bundle is.
    lender: Option<Lender>,
    dir: tempfile::TempDir,
}

/// A host that lends bundles over QUIC, and can be stopped and started.
struct Lender {
    addr: Mutex<SocketAddr>,
    runtime: Mutex<Option<Runtime>>,
}

impl Snapshot {
    pub fn all() -> [Self; 3] {
        [Self::file(), Self::bundle(), Self::lent()]
    }

    /// A bundle on another host.
    pub fn lent() -> Self {
        let bundle = Self::bundle();
        pki::init_for(&bundle.dir.path().join("pki"), &["host".into()], &pki::Validity::default())
            .unwrap();
        let addr = Mutex::new((std::net::Ipv4Addr::LOCALHOST, 0).into());
        let lender = Some(Lender { addr, runtime: Mutex::default() });
        let snapshot = Self { lender, ..bundle };
        snapshot.start_lender();
        snapshot
    }

    fn identity(&self) -> Identity {
        Identity::load(&self.dir.path().join("pki/host")).unwrap()
    }

    pub fn start_lender(&self) {
        let lender = self.lender.as_ref().unwrap();
        let runtime = Runtime::new().unwrap();
        let depot = Depot::open(self.dir.path()).unwrap();
        let mut addr = lender.addr.lock().unwrap();
        let listener = runtime.block_on(async {
            // The one before may not have let go of it yet.
            loop {
                match QuicListener::bind(&self.identity(), *addr) {
                    Err(LinkError::AddressInUse { .. }) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    listener => break listener.unwrap(),
                }
            }
        });
        *addr = listener.local_addr().unwrap();
        runtime.spawn(serve(Box::new(listener), depot, |event| println!("{event:?}")));
        *lender.runtime.lock().unwrap() = Some(runtime);
    }

    /// As if its process were killed: nobody is told.
    pub fn stop_lender(&self) {
        let runtime = self.lender.as_ref().unwrap().runtime.lock().unwrap().take();
        runtime.unwrap().shutdown_timeout(Duration::from_secs(10));
    }

    /// As Firecracker writes it.
    pub fn file() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(PAGES * 4096).unwrap();
        write_pages(&file, 0);
        Self { path, is_bundle: false, lender: None, dir }
    }

    pub fn bundle() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        save(&path, Some);
        Self { path, is_bundle: true, lender: None, dir }
    }

    /// Saves another machine's memory over the bundle.
    pub fn replace(&self) {
        save(&self.path, |page| page.checked_sub(1));
    }

    pub fn memory(&self) -> Memory {
        if let Some(lender) = &self.lender {
            let addr = *lender.addr.lock().unwrap();
            let connector = Arc::new(QuicConnector::new(&self.identity(), addr).unwrap());
            let network = Network::new(move |_| Ok(connector.clone()), PATIENCE);
            let there = PathBuf::from(format!("ferry://{addr}/bundle"));
            Memory::of_chain(Chain::open_on(&network, &there, &[]).unwrap()).unwrap()
        } else if self.is_bundle {
            Memory::of_bundle(&self.path, &[]).unwrap()
        } else {
            Memory::of_file(&self.path).unwrap()
        }
    }

    pub fn resize(&self, pages: u64) {
        open(&self.path).set_len(pages * 4096).unwrap();
    }

    /// Makes the last pages unreadable.
    pub fn damage(&self) {
        if self.is_bundle { self.flip() } else { self.resize(DAMAGED) }
    }

    pub fn repair(&self) {
        if self.is_bundle {
            return self.flip();
        }
        self.resize(PAGES);
        write_pages(&open(&self.path), DAMAGED);
    }

    /// Turns a byte of the last frame, which is in front of the index.
    fn flip(&self) {
        let mut files = std::fs::read_dir(&self.path).unwrap().map(|entry| entry.unwrap().path());
        let is_memory = |path: &PathBuf| path.to_str().unwrap().contains("memory-");
        let memory = files.find(is_memory).unwrap();
        let text = std::fs::read(self.path.join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let at = manifest["memory"]["index_at"].as_u64().unwrap() - 5;
        let (file, mut byte) = (open(&memory), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[!byte[0]], at).unwrap();
    }
}

/// Saves a bundle whose page `page` has the content of page `of(page)`.
fn save(path: &Path, of: impl Fn(u64) -> Option<u64>) {
    let spec = MachineSpec {
        name: "fc1".into(),
        vmm: "test".into(),
        extents: EXTENTS.to_vec(),
        vcpus: 1,
        cpu_features: Vec::new(),
        devices: vec![DeviceSpec { kind: "serial".into(), instance: 0, version: 1 }],
        config: Vec::new(),
    };
    let mut draft = Draft::begin(path, spec, None).unwrap();
    let gfns = EXTENTS.iter().flat_map(|&(start, pages)| start..start + pages);
    for (page, gfn) in gfns.enumerate() {
        if let Some(content) = of(page as u64).and_then(content) {
            draft.put(gfn, &content).unwrap();
        }
    }
    draft.commit(7, &StateWriter::new().finish().unwrap()).unwrap();
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn write_pages(file: &File, from: u64) {
    for page in from..PAGES {
        if let Some(content) = content(page) {
            file.write_all_at(&content, page * 4096).unwrap();
        }
    }
}
