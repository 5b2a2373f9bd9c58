//! What earlier versions wrote is read as what it is, and this version writes the same.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use ferry_bundle::{BundleError, Chain};
use ferry_codec::{Codec, CodecSet, Decoder, HEADER_BYTES, page_check, parse_header};
use ferry_compat::content::{self, PAGES, page};
use ferry_compat::{VERSION, golden};
use ferry_pages::{PAGE_BYTES, Run};
use ferry_protocol::{Hello, StateReader, StateWriter, wire};
use serde::de::DeserializeOwned;

/// Every version of which there are golden files, this one among them.
fn versions() -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(golden("")).unwrap().map(|entry| entry.unwrap());
    let mut all: Vec<_> =
        entries.map(|e| (e.file_name().into_string().unwrap(), e.path())).collect();
    all.sort();
    assert!(all.iter().any(|(name, _)| name == VERSION), "{}", what_to_do("nothing"));
    all
}

fn what_to_do(kept: &str) -> String {
    format!(
        "{kept} is kept of version {VERSION}: `cargo run -p ferry-compat` writes the golden files of a new \
         version. A format that changes needs a new version of the workspace, a new version of the format, and \
         the old golden files as they are"
    )
}

/// Each value is in its file of every version that has it.
#[track_caller]
fn is_read<T: DeserializeOwned + PartialEq + Debug>(kind: &str, all: &[(&str, T)]) {
    for (version, dir) in versions() {
        for (name, expected) in all {
            let Ok(bytes) = fs::read(dir.join(kind).join(name)) else { continue };
            let found = wire::decode::<T>(&bytes);
            let found = found.unwrap_or_else(|e| panic!("{kind}/{name} of {version}: {e}"));
            assert_eq!(&found, expected, "{kind}/{name} of {version}");
        }
    }
}

#[test]
fn every_message_of_every_version_is_read_as_what_it_says() {
    is_read("to-destination", &content::to_destination());
    is_read("to-source", &content::to_source());
    is_read("to-depot", &content::to_depot());
    is_read("to-reader", &content::to_reader());
    for (version, dir) in versions() {
        for (name, hello) in content::hellos() {
            let Ok(bytes) = fs::read(dir.join("hello").join(name)) else { continue };
            assert_eq!(Hello::decode(&bytes), Ok(hello), "{name} of {version}");
        }
    }
}

#[test]
fn every_frame_of_every_version_is_read_as_its_pages() {
    let layout = content::spec().layout().unwrap();
    for (version, dir) in versions() {
        for codec in Codec::ALL {
            let Ok(frame) = fs::read(dir.join("frames").join(codec.name())) else { continue };
            let what = format!("{codec} of {version}");
            let header = parse_header(&frame).unwrap_or_else(|e| panic!("{what}: {e}"));
            let mut decoder = Decoder::new(layout.clone(), CodecSet::ALL.and_same());
            let batch = decoder.decode(&header, &frame[HEADER_BYTES..]);
            let batch = batch.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!((batch.codec, batch.round), (codec, content::ROUND), "{what}");
            if codec == Codec::Zero {
                assert_eq!(batch.runs, content::ZEROS, "{what}");
                continue;
            }
            assert_eq!(batch.runs, [Run::new(2, 3), Run::new(40, 1)], "{what}");
            if codec == Codec::Same {
                let checks = PAGES.iter().map(|gfn| page_check(*gfn, &page(*gfn)));
                assert_eq!(batch.checks, checks.fold(0, u64::wrapping_add), "{what}");
            } else {
                assert!(batch.raw == PAGES.map(page).concat(), "{what}");
            }
        }
    }
}

#[test]
fn state_of_every_version_is_read() {
    for (version, dir) in versions() {
        let Ok(bytes) = fs::read(dir.join("state")) else { continue };
        let state = StateReader::parse(&bytes).unwrap_or_else(|e| panic!("{version}: {e}"));
        state.require_known(&["serial-16550", "clock"]).unwrap();
        assert_eq!(state.read("serial-16550", 0, 1), Ok(content::section()), "{version}");
        assert_eq!(state.read("clock", 0, 1), Ok(0x1122_3344_5566_7788u64), "{version}");
    }
}

fn memory(chain: &Chain) -> BTreeMap<u64, Vec<u8>> {
    let mut all = BTreeMap::new();
    chain
        .visit(|run, bytes, _| {
            all.extend((run.start..).zip(bytes.chunks(PAGE_BYTES).map(<[u8]>::to_vec)));
            Ok::<(), BundleError>(())
        })
        .unwrap();
    all
}

#[test]
fn bundles_of_every_version_are_read_with_their_bases() {
    for (version, dir) in versions() {
        let open = |name: &str| {
            Chain::open(&dir.join(name), &[]).unwrap_or_else(|e| panic!("{version}: {e}"))
        };
        let pages = |gfns: &[u64]| gfns.iter().map(|gfn| (*gfn, page(*gfn))).collect();
        let (base, top) = (open("base"), open("bundle"));
        for (chain, bundles, expected) in
            [(&base, 1, pages(&PAGES)), (&top, 2, pages(&[3, 4, 40, content::NEW]))]
        {
            assert!(memory(chain) == expected, "{version}");
            let verified = chain.verify().unwrap();
            assert_eq!((verified.pages, verified.bundles), (4, bundles), "{version}");
            assert_eq!(chain.manifest().machine.0, content::MACHINE);
            assert_eq!(*chain.spec(), content::spec(), "{version}");
            let state = StateReader::parse(&chain.state().unwrap()).unwrap();
            assert_eq!(state.read("serial-16550", 0, 1), Ok(content::section()), "{version}");
        }
        // Version 1 of the format had no record.
        let record: &[Run] = if top.manifest().version == 1 { &[] } else { &[content::RECORD] };
        assert_eq!((base.record(), top.record()), (&[][..], record), "{version}");
    }
}

/// What a compressor makes of pages may change with its library; what is around it may not.
fn is_compressed(name: &str) -> bool {
    ["frames/lz4", "frames/zstd", "frames/packed"].contains(&name)
}

#[test]
fn this_version_writes_what_it_wrote_when_its_files_were_made() {
    for (name, bytes) in content::files().unwrap() {
        let old = fs::read(golden(VERSION).join(&name));
        let old = old.unwrap_or_else(|e| panic!("{name}: {e}. {}", what_to_do("nothing of it")));
        if is_compressed(&name) {
            let (was, is) = (parse_header(&old).unwrap(), parse_header(&bytes).unwrap());
            assert_eq!((was.codec, was.digest, was.pages), (is.codec, is.digest, is.pages));
        } else {
            assert!(bytes == old, "{name}: {}", what_to_do("something else"));
        }
    }
}

/// A copy of the newest bundle.
fn copy(to: &Path) -> PathBuf {
    for name in ["base", "bundle"] {
        fs::create_dir(to.join(name)).unwrap();
        for entry in fs::read_dir(golden(VERSION).join(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), to.join(name).join(entry.file_name())).unwrap();
        }
    }
    to.join("bundle")
}

#[test]
fn a_bundle_of_a_newer_version_is_refused_with_both_versions_whatever_else_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = copy(dir.path());
    let manifest = bundle.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let ours = format!("\"version\": {}", ferry_bundle::VERSION);
    let newer = ferry_bundle::VERSION + 1;
    for change in [
        text.replacen(&ours, &format!("\"version\": {newer}"), 1),
        // What is new in it is not known here, and no reason to call it damaged.
        text.replacen(&ours, &format!("\"version\": {newer}, \"new\": [1]"), 1),
    ] {
        assert_ne!(change, text);
        fs::write(&manifest, change).unwrap();
        let said = Chain::open(&bundle, &[]).unwrap_err().to_string();
        for words in [format!("version {newer}"), format!("up to {}", newer - 1), "update".into()] {
            assert!(said.contains(&words), "{words}: {said}");
        }
    }
}

#[test]
fn state_of_a_newer_version_is_refused_with_both_versions() {
    let mut writer = StateWriter::new();
    writer.put("clock", 0, 3, 2, &0u64).unwrap();
    writer.put("later", 1, 1, 1, &0u64).unwrap();
    let state = StateReader::parse(&writer.finish().unwrap()).unwrap();
    let said = state.read::<u64>("clock", 0, 1).unwrap_err().to_string();
    for words in ["clock[0]", "version 3", "reader of version 2", "this one reads 1", "update"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let said = state.require_known(&["clock"]).unwrap_err().to_string();
    assert!(said.contains("later[1]") && said.contains("update"), "{said}");
}

#[test]
fn a_hello_that_is_not_known_here_is_told_from_a_strangers() {
    let mut newer = Hello::control().encode();
    // Behind the eight bytes of magic: which hello it is.
    newer[8] = 200;
    let said = Hello::decode(&newer).unwrap_err().to_string();
    assert!(said.contains("update the older one"), "{said}");
    let said = Hello::decode(b"GET / HTTP/1.1").unwrap_err().to_string();
    assert!(said.contains("does not speak Ferry") && !said.contains("update"), "{said}");
}
