//! A snapshot's memory: what each page holds, as a memory file and as a bundle.

#![allow(unreachable_pub, reason = "a module of tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ferry_bundle::Draft;
use ferry_firecracker::Memory;
use ferry_protocol::{DeviceSpec, MachineSpec, StateWriter};

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
    _dir: tempfile::TempDir,
}

impl Snapshot {
    pub fn both() -> [Self; 2] {
        [Self::file(), Self::bundle()]
    }

    /// As Firecracker writes it.
    pub fn file() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(PAGES * 4096).unwrap();
        write_pages(&file, 0);
        Self { path, is_bundle: false, _dir: dir }
    }

    pub fn bundle() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        let spec = MachineSpec {
            name: "fc1".into(),
            vmm: "test".into(),
            extents: EXTENTS.to_vec(),
            vcpus: 1,
            cpu_features: Vec::new(),
            devices: vec![DeviceSpec { kind: "serial".into(), instance: 0, version: 1 }],
            config: Vec::new(),
        };
        let mut draft = Draft::begin(&path, spec, None).unwrap();
        let gfns = EXTENTS.iter().flat_map(|&(start, pages)| start..start + pages);
        for (page, gfn) in gfns.enumerate() {
            if let Some(content) = content(page as u64) {
                draft.put(gfn, &content).unwrap();
            }
        }
        draft.commit(7, &StateWriter::new().finish().unwrap()).unwrap();
        Self { path, is_bundle: true, _dir: dir }
    }

    pub fn memory(&self) -> Memory {
        if self.is_bundle {
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
