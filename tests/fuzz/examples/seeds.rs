//! Writes the seeds of the corpora, out of real encoders: `cargo run -p ferry-fuzz --example seeds`.
//! What fuzzing found beside them stays.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferry_bundle::{Chain, Draft};
use ferry_codec::{
    BatchBuilder, Codec, PackedBuilder, PackedPage, Packer, page_digest, zero_frames,
};
use ferry_pages::{PAGE_BYTES, PageSet, Run};
use ferry_protocol::{
    DeviceSpec, Fetched, Hello, MachineSpec, PackedPages, Recalled, Refusal, RunPermit,
    StateWriter, ToDepot, ToDestination, ToReader, ToSource, Verdict, wire,
};
use ferry_refvmm::fuzzing::Device;

type Seeds = Vec<(String, Vec<u8>)>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let all = [
        ("frames", frames()),
        ("messages", messages()?),
        ("protocol", dice(6, 600)),
        ("state", state()?),
        ("balloon", dice(4, 400)),
        ("bundle", bundles()?),
        ("handover", handovers()),
        ("control", controls()),
        ("plan", plans()),
        ("allow", allows()),
    ];
    for (target, seeds) in all {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        std::fs::create_dir_all(&dir)?;
        for (name, bytes) in seeds {
            std::fs::write(dir.join(format!("seed-{name}")), bytes)?;
        }
    }
    Ok(())
}

/// Bytes without a pattern, the first of each `0`, `1`, …
fn dice(count: u8, bytes: usize) -> Seeds {
    (0..count).map(|n| (n.to_string(), [vec![n], noise(n.into(), bytes)].concat())).collect()
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut word = seed;
    let mut next = || {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        word.to_le_bytes()[7]
    };
    (0..bytes).map(|_| next()).collect()
}

/// A page that each codec makes something of.
fn page(gfn: u64) -> Vec<u8> {
    let mut page = vec![gfn.to_le_bytes()[0] | 1; PAGE_BYTES];
    page[100..140].copy_from_slice(&noise(gfn, 40));
    page
}

fn frames() -> Seeds {
    let mut seeds = Seeds::new();
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        let mut builder = BatchBuilder::new();
        builder.begin(1);
        let count = if codec == Codec::Raw { 1 } else { 5 };
        for gfn in 0..count {
            builder.push(gfn * gfn, |place| place.copy_from_slice(&page(gfn))).expect("room");
        }
        let frame = builder.finish(codec).frame.expect("pages");
        seeds.push((codec.to_string(), [&[0], &frame[..]].concat()));
    }
    let mut builder = BatchBuilder::new();
    builder.begin(1);
    for gfn in [3, 4, 9] {
        builder
            .push_unless(gfn, |place| place.copy_from_slice(&page(gfn)), |_| true)
            .expect("room");
    }
    let same = builder.finish(Codec::Raw).same.expect("pages").0;
    seeds.push(("same".into(), [&[0], &same[..]].concat()));
    let zero = zero_frames(2, &[Run::new(0, 7), Run::new(2000, 1 << 19)]).next().expect("one");
    seeds.push(("zero".into(), [&[0], &zero[..]].concat()));
    let (mut packer, mut builder) = (Packer::default(), PackedBuilder::default());
    for gfn in [1, 2, 7] {
        let page = page(gfn);
        let (codec, bytes) = packer.pack(&page);
        seeds.push((format!("page-{gfn}"), [&[1, codec.to_wire()], bytes].concat()));
        let digest = page_digest(gfn, &page);
        assert!(builder.push(&PackedPage { gfn, codec, bytes, digest }));
    }
    let packed = builder.finish(2).expect("pages").0;
    seeds.push(("packed".into(), [&[0], &packed[..]].concat()));
    seeds.push(("honest".into(), [vec![2], noise(5, 300)].concat()));
    let messages = [vec![3], noise(6, 14), vec![4, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0], vec![9; 30]];
    seeds.push(("pieces".into(), messages.concat()));
    seeds
}

fn spec() -> MachineSpec {
    MachineSpec {
        name: "web1".into(),
        vmm: "test".into(),
        extents: vec![(0, 64), (128, 64)],
        vcpus: 1,
        cpu_features: vec!["avx2".into()],
        devices: vec![DeviceSpec { kind: "serial".into(), instance: 0, version: 1 }],
        config: vec![0, 255],
    }
}

fn messages() -> Result<Seeds, wire::WireError> {
    let some: PageSet = [Run::new(3, 4), Run::new(900, 124)].into_iter().collect();
    let some = || PackedPages::pack(&some);
    let mut seeds = Seeds::new();
    let mut add = |kind: u8, name: &str, bytes: Vec<u8>| {
        seeds.push((name.into(), [vec![kind], bytes].concat()));
    };
    for (name, hello) in [
        ("hello-control", Hello::control()),
        ("hello-lane", Hello::Lane { session: 7, link: 1, lane: 2 }),
        ("hello-rejoin", Hello::Rejoin { session: 7, done: 3, link: 1 }),
        ("hello-bundles", Hello::Bundles { version: 1 }),
    ] {
        add(0, name, hello.encode());
    }
    for (name, message) in [
        (
            "offer",
            ToDestination::Offer {
                spec: spec(),
                codecs: 15,
                lanes: 2,
                keep: Duration::from_secs(60),
                machine: Some(5),
            },
        ),
        ("round-end", ToDestination::RoundEnd { round: 1, batches: 2 }),
        (
            "commit",
            ToDestination::Commit {
                permit: RunPermit::for_new_machine(5),
                state: vec![1, 2, 3],
                rounds: vec![(1, 2)],
                owed: some(),
            },
        ),
        ("abort", ToDestination::Abort { reason: "no".into() }),
        ("verified", ToDestination::Verified { matches: true }),
    ] {
        add(1, name, wire::encode(&message)?);
    }
    for (name, message) in [
        (
            "accepted",
            ToSource::Accepted {
                version: 2,
                session: 7,
                codecs: 15,
                no_post_copy: Some("no".into()),
            },
        ),
        ("recalls", ToSource::Recalls(Recalled { pages: some(), digests: vec![9; 128] })),
        ("refused", ToSource::Refused { reasons: vec![Refusal::new("cpu", "none")] }),
        ("round-done", ToSource::RoundDone { round: 1, lacking: some() }),
        ("running", ToSource::Running { pages_us: 1, load_us: 2, resume_us: 3 }),
        ("digest", ToSource::Digest { sum: Some(1), fetched: Some(Fetched::default()) }),
        ("lacks", ToSource::Lacks { owed: some() }),
        ("verdict", ToSource::Verdict(Verdict::Ran)),
    ] {
        add(2, name, wire::encode(&message)?);
    }
    add(3, "open", wire::encode(&ToDepot::Open { file: 1, path: "a/manifest.json".into() })?);
    add(3, "read", wire::encode(&ToDepot::Read { file: 1, at: 4096, bytes: 1 << 20 })?);
    add(4, "opened", wire::encode(&ToReader::Opened { bytes: 5 })?);
    add(4, "missing", wire::encode(&ToReader::Missing { why: "gone".into() })?);
    let spooled = [&7u128.to_le_bytes()[..], &[15, 3, 0, 0, 0], &wire::encode(&some())?].concat();
    add(5, "spooled", spooled);
    add(6, "pages", wire::encode(&some())?[8..].to_vec());
    Ok(seeds)
}

fn state() -> Result<Seeds, Box<dyn std::error::Error>> {
    let mut writer = StateWriter::new();
    writer.put("clock", 0, 1, 1, &77u64)?;
    writer.put("msrs", 0, 1, 1, &vec![1u64, 2, 3])?;
    let sections = writer.finish()?;
    let device = Device::new(8 << 20)?;
    Ok(vec![
        ("sections".into(), [vec![0], sections].concat()),
        ("contents".into(), [vec![1], noise(1, 300)].concat()),
        ("balloon".into(), [vec![2], device.save()?].concat()),
    ])
}

fn bundles() -> Result<Seeds, Box<dyn std::error::Error>> {
    let place = tempfile::tempdir()?;
    let (old, new) = (place.path().join("old"), place.path().join("new"));
    let mut state = StateWriter::new();
    state.put("serial", 0, 1, 1, &(42u8, "registers".to_owned()))?;
    let state = state.finish()?;
    let mut draft = Draft::begin(&old, spec(), None)?;
    draft.record([[Run::new(0, 5), Run::new(130, 1)].into_iter().collect()].iter());
    for gfn in [3, 4, 5, 130] {
        draft.put(gfn, &page(gfn))?;
    }
    draft.commit(5, &state)?;
    let mut draft = Draft::begin(&new, spec(), Some(Arc::new(Chain::open(&old, &[])?)))?;
    draft.put(4, &page(9))?;
    draft.put_zero(5)?;
    draft.commit(5, &state)?;
    let files = |dir: &Path| -> std::io::Result<Vec<Vec<u8>>> {
        let mut paths: Vec<_> =
            std::fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        // manifest.json, memory-…, state-…
        paths.sort();
        paths.iter().map(std::fs::read).collect()
    };
    let (old, new) = (files(&old)?, files(&new)?);
    let one = old.join(&b"<~>"[..]);
    Ok(vec![("one".into(), one), ("chain".into(), [new, old].concat().join(&b"<~>"[..]))])
}

fn handovers() -> Seeds {
    let region = |host: u64, size: u64, offset: u64, rest: &str| {
        format!(r#"{{"base_host_virt_addr":{host},"size":{size},"offset":{offset}{rest}}}"#)
    };
    let texts = [
        (
            "one",
            format!(
                "[{}]",
                region(1 << 30, 1 << 27, 0, r#","page_size":4096,"page_size_kib":4096"#)
            ),
        ),
        (
            "two",
            format!(
                "[{},{}]",
                region(1 << 32, 3 << 30, 0, r#","page_size_kib":2097152"#),
                region(
                    1 << 30,
                    1 << 30,
                    3 << 30,
                    r#","page_size_kib":2097152,"more":[null,{"a":1.5}]"#
                )
            ),
        ),
        ("old", format!("[{}]", region(4096, 4096, 4096, ""))),
    ];
    texts.map(|(name, text)| (name.to_owned(), text.into_bytes())).to_vec()
}

fn controls() -> Seeds {
    let texts = [
        ("simple", "\"show\"\n\"pause\"\n\"stop\"\n\"cancel\"\n"),
        ("resume", "{\"resume\":{\"destination_is_dead\":true}}\n"),
        (
            "migrate",
            r#"{"migrate":{"to":"[::1]:7001","identity":"/a","max_downtime_us":50,"max_total_us":300000,"bandwidth_bytes_per_s":null,"mode":"pre-copy","resume":false,"rejoin_ms":60000,"spool":"/b"}}"#,
        ),
        ("save", r#"{"save":{"dir":"/a","base":"/b","stop":true,"max_stop_ms":1000}}"#),
        ("balloon", r#"{"balloon":{"target_bytes":4096,"ask_guest":true}}"#),
        ("limit", r#"{"limit":{"bytes":1048576,"swap":null}}"#),
        (
            "share",
            r#"{"share":{"tenant":"a","between_tenants":true,"first":null,"elsewhere":[4,[1,2,3]],"merge":true,"fingerprints":true}}"#,
        ),
        ("done", "{\"done\":\"yes\"}\n{\"error\":\"no\"}\n"),
        (
            "progress",
            r#"{"progress":{"round":1,"round_pages":5,"sent_bytes":9,"rate_bytes_per_s":1.5,"dirty_pages_per_s":0.25,"expected_downtime_ms":null,"words":"x"}}"#,
        ),
    ];
    texts.map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())).to_vec()
}

fn allows() -> Seeds {
    let text = "host1 *\nhost2 web1 web2  # both\nsha256:HEX db1 dir/x\n";
    vec![("example".into(), text.replace("HEX", &"3f".repeat(32)).into_bytes())]
}

fn plans() -> Seeds {
    let example = include_bytes!("../../../memory/overcommit/example.toml");
    // Without the comments: shorter inputs are changed in more places.
    let text: String = String::from_utf8_lossy(example)
        .lines()
        .filter_map(|line| {
            line.split('#').next().map(str::trim_end).filter(|line| !line.is_empty())
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let small = "[host]\nbudget=\"6G\"\n[[machine]]\nname=\"a\"\nsize=\"3G\"\nswap=false\n";
    let with = |text: &str, seed| [text.as_bytes(), &[0], &noise(seed, 500)].concat();
    vec![("example".into(), with(&text, 1)), ("small".into(), with(small, 2))]
}
