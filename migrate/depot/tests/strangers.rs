//! Peers that lie, and paths that lead out: each is told off, nothing is given away, and others are served.

#[path = "../../bundle/tests/model/mod.rs"]
mod model;
mod town;

use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ferry_bundle::Pages;
use ferry_protocol::{Hello, MAX_READ_BYTES, ToDepot, ToReader};
use ferry_transport::{Channel, Connector};
use model::{file, page, save, some_memory};
use town::{Address, Lender, Talk, open};

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn open_of(path: &str) -> ToDepot {
    ToDepot::Open { file: 0, path: path.into() }
}

/// What was said of the peer that was turned away as this one, which is said when it is gone.
fn turned(lender: &Lender, number: usize) -> String {
    let began = Instant::now();
    loop {
        if let Some(why) = lender.turned().get(number) {
            return why.clone();
        }
        assert!(began.elapsed() < Duration::from_secs(20), "it was not said");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn assert_serves(address: &Arc<Address>) {
    assert_eq!(open(address, "b").unwrap().verify().unwrap().pages, some_memory().len() as u64);
}

#[test]
fn nothing_but_files_of_bundles_below_the_directory_is_given_out() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::<Address>::default());
    let (lent, out) = (dir.path().join("lent"), dir.path().join("out"));
    for place in [&lent, &out] {
        std::fs::create_dir(place).unwrap();
        save(&place.join("b"), &some_memory(), None).unwrap();
    }
    std::fs::write(lent.join("secret"), "s").unwrap();
    std::fs::create_dir_all(lent.join("odd/manifest.json")).unwrap();
    symlink(&out, lent.join("way-out")).unwrap();
    symlink("../out/b", lent.join("crooked")).unwrap();
    symlink("b", lent.join("alias")).unwrap();
    std::fs::create_dir(lent.join("linked")).unwrap();
    symlink(file(&out.join("b"), "manifest"), lent.join("linked/manifest.json")).unwrap();
    let memory = file(&lent.join("b"), "mem");
    let memory = memory.file_name().unwrap().to_str().unwrap().to_owned();
    let pipe = lent.join(memory.replace("memory", "state").replace(['0', '1'], "a"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let pipe = pipe.file_name().unwrap().to_str().unwrap();

    let _lender = Lender::of(&address, &lent);
    let outside = out.join("b/manifest.json");
    let inside = lent.join("b/manifest.json");
    let (outside, inside) = (outside.to_str().unwrap(), inside.to_str().unwrap());
    run(async {
        let mut talk = Talk::to(&address).await;
        let mut ask = async |path: &str| {
            talk.say(&open_of(path)).await;
            talk.answer().await.unwrap().0
        };
        for path in ["b/manifest.json", "alias/manifest.json", "odd/../b/manifest.json"] {
            assert!(matches!(ask(path).await, ToReader::Opened { .. }), "{path}");
        }
        assert!(matches!(ask(&format!("b/{memory}")).await, ToReader::Opened { .. }));
        let long = format!("{}manifest.json", "./".repeat(2040));
        for path in [
            "../out/b/manifest.json",
            "b/../../out/b/manifest.json",
            "way-out/b/manifest.json",
            "crooked/manifest.json",
            "linked/manifest.json",
            "secret",
            "b",
            "",
            "..",
            "b/",
            "odd/manifest.json",
            "b/manifest.json/",
            "b/manifest.json\0",
            "b\0/manifest.json",
            "b/draft-00000000000000000000000000000000",
            outside,
            inside,
            pipe,
            &long,
        ] {
            let answer = ask(path).await;
            let given = matches!(answer, ToReader::Opened { .. } | ToReader::Data { .. });
            assert!(!given, "{path:?}: {answer:?}");
        }
        for path in
            ["c/manifest.json", "b/manifest.json/manifest.json", "odd/manifest.json/manifest.json"]
        {
            assert!(matches!(ask(path).await, ToReader::Missing { .. }), "{path}");
        }
    });
}

#[test]
fn a_reader_that_asks_for_too_much_is_turned_away_and_others_are_served() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::<Address>::default());
    save(&dir.path().join("b"), &some_memory(), None).unwrap();
    let lender = Lender::of(&address, dir.path());
    let opened = ferry_protocol::wire::encode(&open_of("b/manifest.json")).unwrap();
    let read =
        |file, at, bytes| ferry_protocol::wire::encode(&ToDepot::Read { file, at, bytes }).unwrap();
    let cases: [(&str, Vec<u8>); 7] = [
        (
            "too many files",
            ferry_protocol::wire::encode(&ToDepot::Open { file: 256, path: "b".into() }).unwrap(),
        ),
        ("did not open", read(1, 0, 1)),
        ("did not open", read(u16::MAX, 0, 1)),
        ("bytes at once", read(0, 0, MAX_READ_BYTES + 1)),
        ("bytes at once", read(0, 0, u32::MAX)),
        ("nonsense", b"\xff\xff\xff\xff".to_vec()),
        ("is announced", vec![0; 5000]),
    ];
    for (number, (why, bytes)) in cases.iter().enumerate() {
        run(async {
            let mut talk = Talk::to(&address).await;
            talk.say_bytes(&opened).await;
            assert!(matches!(talk.answer().await, Ok((ToReader::Opened { .. }, _))));
            talk.say_bytes(bytes).await;
            talk.answer().await.unwrap_err();
        });
        assert!(turned(&lender, number).contains(why), "`{why}`: {:?}", lender.turned());
    }
    run(async {
        let mut talk = Talk::to(&address).await;
        talk.say_bytes(&opened).await;
        let _ = talk.answer().await;
        // Behind the end is an answer like any other.
        for at in [1 << 20, u64::MAX] {
            talk.say(&ToDepot::Read { file: 0, at, bytes: 9 }).await;
            assert!(matches!(talk.answer().await, Ok((ToReader::Failed { .. }, _))));
        }
        talk.say(&ToDepot::Read { file: 0, at: 0, bytes: 3 }).await;
        assert_eq!(talk.answer().await, Ok((ToReader::Data { bytes: 3 }, b"{\n ".to_vec())));
    });
    for (number, (why, hello)) in [
        ("takes in no machines", Hello::control()),
        ("update the older one", Hello::Bundles { version: 9 }),
    ]
    .into_iter()
    .enumerate()
    {
        run(async {
            let mut talk = Talk::on(address.connect().await.unwrap());
            talk.say_bytes(&hello.encode()).await;
            talk.answer().await.unwrap_err();
        });
        let said = turned(&lender, cases.len() + number);
        assert!(said.contains(why), "`{why}` is not in: {said}");
    }
    assert_serves(&address);
}

#[test]
fn more_readers_than_there_are_places_in_all_or_for_one_are_turned_away_until_some_have_gone() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::<Address>::default());
    save(&dir.path().join("b"), &some_memory(), None).unwrap();
    let _lender = Lender::of(&address, dir.path());
    run(async {
        let mut talks = Vec::new();
        for (name, places, words) in [
            ("greedy", 48, "it has 48 connections here already"),
            ("modest", 16, "64 connections read bundles here already"),
        ] {
            let address = address.named(name);
            for _ in 0..places {
                let mut talk = Talk::to(&address).await;
                talk.say(&open_of("b/manifest.json")).await;
                talk.answer().await.unwrap();
                talks.push(talk);
            }
            let why = Talk::to(&address).await.answer().await.unwrap_err();
            assert!(why.contains(words) && why.contains("try again"), "{why}");
        }
    });
    let mut tries = 0;
    while open(&address, "b").is_err() {
        tries += 1;
        assert!(tries < 100, "the places are free again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Opens a bundle at a depot that answers each request by `lie`, if that has an answer, and else honestly.
fn lied_to(
    dir: &Path,
    lie: impl Fn(&ToDepot) -> Option<(ToReader, Vec<u8>)> + Clone + Send + Sync + 'static,
) -> String {
    let address = Arc::<Address>::default();
    let honest = Arc::<Address>::default();
    let _honest = Lender::of(&honest, dir);
    let _liar = Lender::who(&address, move |channel: Channel| {
        let (honest, lie) = (honest.clone(), lie.clone());
        async move {
            let mut talk = Talk::on(channel);
            talk.hello().await;
            let mut truth = Talk::to(&honest).await;
            while let Some(request) = talk.asked().await {
                truth.say(&request).await;
                let (answer, data) = truth.answer().await.unwrap();
                let (answer, data) = lie(&request).unwrap_or((answer, data));
                talk.reply(&answer, &data).await;
            }
        }
    });
    let lied = open(&address, "b").and_then(|chain| chain.verify());
    lied.expect_err("a lie was believed").to_string()
}

#[test]
fn a_depot_that_lies_is_an_error_that_names_host_and_file() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("b"), &some_memory(), None).unwrap();
    let data = |bytes: u32, sent: usize| Some((ToReader::Data { bytes }, vec![7; sent]));
    type Lie = Box<dyn Fn(&ToDepot) -> Option<(ToReader, Vec<u8>)> + Send + Sync>;
    let of_open = |answer: fn(u64) -> ToReader| -> Lie {
        Box::new(move |asked| match asked {
            ToDepot::Open { path, .. } if path.contains("mem") => Some((answer(9), Vec::new())),
            _ => None,
        })
    };
    let of_read = |lie: fn(u32) -> Option<(u32, usize)>| -> Lie {
        Box::new(move |asked| match asked {
            ToDepot::Read { bytes, .. } => lie(*bytes).and_then(|(bytes, sent)| data(bytes, sent)),
            ToDepot::Open { .. } => None,
        })
    };
    let cases: Vec<(&str, Lie)> = vec![
        ("where", of_read(|asked| Some((asked - 1, asked as usize - 1)))),
        ("where", of_read(|asked| Some((asked + 1, asked as usize + 1)))),
        ("where", of_read(|_| Some((0, 0)))),
        ("at once", of_read(|_| Some((MAX_READ_BYTES + 1, 0)))),
        ("at once", of_read(|_| Some((u32::MAX, 0)))),
        ("damaged", of_read(|asked| Some((asked, asked as usize)))),
        ("something else", of_open(|_| ToReader::Data { bytes: 0 })),
        ("it has 9 bytes", of_open(|bytes| ToReader::Opened { bytes })),
        ("it has 18446744073709551615 bytes", of_open(|_| ToReader::Opened { bytes: u64::MAX })),
        ("no such file", of_open(|_| ToReader::Missing { why: "no such file".into() })),
        ("go away", of_open(|_| ToReader::Failed { why: "go away".into() })),
        ("is announced", of_open(|_| ToReader::Failed { why: "x".repeat(5000) })),
    ];
    for (why, lie) in cases {
        let lie = Arc::new(lie);
        let words = lied_to(dir.path(), move |asked| lie(asked));
        for words_of_it in [why, "ferry://host1:7001/b"] {
            assert!(words.contains(words_of_it), "`{words_of_it}` is not in: {words}");
        }
    }
}

#[test]
fn a_page_that_is_waited_for_does_not_stand_behind_what_is_read_ahead() {
    let (dir, address) = (tempfile::tempdir().unwrap(), Arc::<Address>::default());
    let memory: model::Memory = (0..700).map(|gfn| (gfn, page(gfn + 7, true))).collect();
    save(&dir.path().join("b"), &memory, None).unwrap();
    let honest = Arc::<Address>::default();
    let _honest = Lender::of(&honest, dir.path());
    // One that answers no read of any frame but the first on the channel on which manifests are read: it only
    // counts them.
    let ahead = Arc::new(AtomicUsize::new(0));
    let counted = ahead.clone();
    let here = model::open(&dir.path().join("b")).unwrap();
    let frames_end = here.manifest().memory.record.unwrap().at;
    let _lender = Lender::who(&address, move |channel: Channel| {
        let (honest, counted) = (honest.clone(), counted.clone());
        async move {
            let (mut talk, mut first) = (Talk::on(channel), false);
            talk.hello().await;
            let mut truth = Talk::to(&honest).await;
            while let Some(request) = talk.asked().await {
                if let ToDepot::Read { at: 0, .. } = request {
                    first = true;
                }
                let of_frame =
                    matches!(request, ToDepot::Read { at, .. } if at > 32 && at < frames_end);
                if first && of_frame {
                    counted.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                truth.say(&request).await;
                let (answer, data) = truth.answer().await.unwrap();
                talk.reply(&answer, &data).await;
            }
        }
    });
    let chain = open(&address, "b").unwrap();
    let mut reader = Pages::new(chain.clone());
    assert!(reader.page(0).unwrap().is_some());
    std::thread::spawn(move || drop(reader.page(64)));
    let began = Instant::now();
    while ahead.load(Ordering::SeqCst) < 4 {
        // It asks on before the first answer is there: several requests are on their way.
        assert!(began.elapsed() < Duration::from_secs(20), "{ahead:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut waited = Pages::waited_for(chain);
    for gfn in [600, 65, 1] {
        assert!(waited.page(gfn).unwrap() == Some(memory[&gfn].as_slice()), "page {gfn}");
    }
}
