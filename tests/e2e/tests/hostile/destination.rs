//! A hostile destination against a running machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ferry_codec::CodecSet;
use ferry_migrate::{Left, OutcomeKind, Refusal, SendHandle};
use ferry_pages::Run;
use ferry_process_guest::{ProcessGuest, ProcessHost};
use ferry_protocol::{
    Hello, PackedPages, Recalled, ToDestination, ToSource, VERSION_MAX, Verdict, wire,
};
use ferry_transport::{Connector, FrameReader, Listener, memory, send_message};

use crate::stage::{Destination, Dice, Link, Maker, Subject, eventually, goes_on, migrate};
use crate::{maker, message, options, panics};

/// What a hostile destination says.
enum Say {
    Message(ToSource),
    Raw(Vec<u8>),
    Close,
}

use Say::{Close, Message, Raw};

type Script = fn(Option<&ToDestination>) -> Vec<Say>;

fn accepted(version: u16, codecs: u8) -> ToSource {
    ToSource::Accepted { version, session: 7, codecs, no_post_copy: None }
}

fn old_copy(run: Run, digests: usize) -> ToSource {
    let pages = PackedPages::pack(&std::iter::once(run).collect());
    ToSource::Recalls(Recalled { pages, digests: vec![1; digests] })
}

/// What an honest destination says, as far as the commit.
fn honest(heard: Option<&ToDestination>) -> Vec<Say> {
    match heard {
        Some(ToDestination::Offer { codecs, .. }) => {
            vec![Message(accepted(VERSION_MAX, *codecs))]
        }
        Some(ToDestination::Prepare) => vec![Message(ToSource::Ready)],
        Some(ToDestination::RoundEnd { round, .. }) => {
            vec![Message(ToSource::RoundDone { round: *round, lacking: PackedPages::default() })]
        }
        _ => vec![],
    }
}

/// Plays `script` to whoever connects. Lanes are read and forgotten; inquiries meet silence.
async fn play(mut listener: Box<dyn Listener>, script: Script) {
    while let Some(Ok(mut channel)) = listener.accept().await {
        tokio::spawn(async move {
            let mut reader = FrameReader::new(channel.source);
            let Ok(Some(hello)) = reader.read_message(256).await else { return };
            if !matches!(Hello::decode(&hello), Ok(Hello::Control { .. })) {
                let mut source = reader.into_parts().0;
                while let Ok(Some(_)) = source.recv().await {}
                return;
            }
            let mut heard = None;
            loop {
                for say in script(heard.as_ref()) {
                    let sent = match say {
                        Message(m) => {
                            let bytes = wire::encode(&m).unwrap();
                            send_message(channel.sink.as_mut(), &bytes).await
                        }
                        Raw(bytes) => channel.sink.send(bytes.into()).await,
                        Close => return channel.sink.close("enough").await,
                    };
                    if sent.is_err() {
                        return;
                    }
                }
                let Ok(Some(bytes)) = reader.read_message(wire::MAX_MESSAGE_BYTES).await else {
                    return;
                };
                heard = wire::decode(&bytes).ok();
            }
        });
    }
}

/// A machine meets `script`, and the engine's word.
fn meets(source: &mut ProcessGuest, script: Script) -> ferry_migrate::Sent {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (connector, listener) = memory::pair(4);
    runtime.spawn(play(Box::new(listener), script));
    let connector: Arc<dyn Connector> = Arc::new(connector);
    let sent = migrate(source, &connector, &options());
    runtime.shutdown_background();
    sent
}

macro_rules! instead {
    ($pattern:pat => $say:expr) => {
        (|heard| match heard {
            $pattern => $say,
            other => honest(other),
        }) as Script
    };
}

#[test]
fn a_hostile_destination_is_told_off_and_the_machine_goes_on_at_its_source() {
    panics();
    use ToDestination as D;
    let scripts: Vec<(&str, &str, Script)> = vec![
        ("closes at once", "enough", instead!(None => vec![Close])),
        ("garbage at once", "nonsense", instead!(None => vec![Raw(message(&[0xee; 99]))])),
        ("4 GiB", "4294967295 bytes", instead!(None => vec![Raw(vec![0xff; 4])])),
        ("half a message", "enough", instead!(None => vec![Raw(vec![9, 0, 0, 0, 1]), Close])),
        (
            "a version of tomorrow",
            "version 99",
            instead!(Some(D::Offer { .. }) => {
                vec![Message(accepted(99, 3))]
            }),
        ),
        (
            "codecs not offered",
            "not offered",
            instead!(Some(D::Offer { .. }) => {
                vec![Message(accepted(VERSION_MAX, !CodecSet::ALL.bits()))]
            }),
        ),
        (
            "has an old copy of more than there is",
            "old copy of",
            instead!(Some(D::Offer { .. }) => {
                vec![Message(old_copy(Run::new(1, 1 << 30), 9))]
            }),
        ),
        (
            "has an old copy without its digests",
            "9 digests of 10 pages",
            instead!(Some(D::Offer { .. }) => {
                vec![Message(old_copy(Run::new(0, 10), 9))]
            }),
        ),
        (
            "has an old copy twice",
            "0 of them new",
            instead!(Some(D::Offer { .. }) => {
                vec![Message(old_copy(Run::new(0, 10), 10)), Message(old_copy(Run::new(0, 10), 10))]
            }),
        ),
        (
            "has an old copy too late",
            "Recalls was not expected",
            instead!(Some(D::Prepare) => vec![Message(old_copy(Run::new(0, 10), 10))]),
        ),
        (
            "lacks what was not sent",
            "lacks pages that were not sent",
            instead!(Some(D::RoundEnd { round, .. }) => {
                let lacking = PackedPages::pack(&std::iter::once(Run::new(1 << 40, 1)).collect());
                vec![Message(ToSource::RoundDone { round: *round, lacking })]
            }),
        ),
        (
            "accepts twice",
            "Accepted was not expected",
            instead!(Some(D::Prepare) => {
                vec![Message(accepted(VERSION_MAX, 3))]
            }),
        ),
        (
            "runs before the commit",
            "Running was not expected",
            instead!(Some(D::Prepare) => {
                vec![Message(ToSource::Running { pages_us: 0, load_us: 0, resume_us: 0 })]
            }),
        ),
        (
            "refuses a commit that was not made",
            "CommitRefused was not expected",
            instead!(Some(D::Prepare) => {
                vec![Message(ToSource::CommitRefused { reason: "no".into() })]
            }),
        ),
        (
            "another round is done",
            "RoundDone was not expected",
            instead!(Some(D::RoundEnd { .. }) => {
                vec![Message(ToSource::RoundDone { round: 77, lacking: PackedPages::default() })]
            }),
        ),
        (
            "a digest of nothing",
            "Digest was not expected",
            instead!(Some(D::RoundEnd { .. }) => {
                vec![Message(ToSource::Digest { sum: Some(1), fetched: None })]
            }),
        ),
        (
            "a verdict that nobody asked for",
            "Verdict was not expected",
            instead!(Some(D::RoundEnd { .. }) => {
                vec![Message(ToSource::Verdict(Verdict::Ran))]
            }),
        ),
        (
            "gives up",
            "out of tea",
            instead!(Some(D::RoundEnd { .. }) => {
                vec![Message(ToSource::Failed { reason: "out of tea".into() })]
            }),
        ),
        (
            "refuses late",
            "no room",
            instead!(Some(D::RoundEnd { .. }) => {
                vec![Message(ToSource::Refused { reasons: vec![Refusal::new("host", "no room")] })]
            }),
        ),
        ("closes in a round", "enough", instead!(Some(D::RoundEnd { .. }) => vec![Close])),
        (
            "refuses the commit",
            "cannot load",
            instead!(Some(D::Commit { .. }) => {
                vec![Message(ToSource::CommitRefused { reason: "cannot load".into() })]
            }),
        ),
    ];
    let mut source = maker().busy_guest();
    for (name, word, script) in scripts {
        let sent = meets(&mut source, script);
        let report = &sent.report;
        assert!(report.reason.contains(word), "{name}: `{word}` is not in: {}", report.reason);
        assert!(matches!(report.outcome, OutcomeKind::Failed | OutcomeKind::Refused), "{name}");
        assert!(matches!(sent.left, Left::Running), "{name}: {:?}", sent.left);
        assert!(source.runs(), "{name}");
        goes_on(&source, 100);
    }
    let host = Destination::start(Link::Memory, ProcessHost::default());
    let sent = migrate(&mut source, &host.connector, &options());
    assert!(sent.report.digest_verified, "{}", sent.report.reason);
    goes_on(&host.arrival().expect("a machine").0, 1024);
    assert_eq!(panics().load(Ordering::SeqCst), 0);
}

#[test]
fn a_destination_that_lies_about_time_and_memory_is_found_out() {
    panics();
    let mut source = maker().busy_guest();
    let sent = meets(&mut source, |heard| match heard {
        Some(ToDestination::Commit { .. }) => vec![
            Message(ToSource::Running {
                pages_us: u64::MAX,
                load_us: u64::MAX,
                resume_us: u64::MAX,
            }),
            Message(ToSource::Digest { sum: Some(0), fetched: None }),
        ],
        other => honest(other),
    });
    assert_eq!(sent.report.outcome, OutcomeKind::Completed);
    assert!(sent.report.memory_differs && !sent.report.digest_verified);
    assert!(sent.report.downtime_ms.is_finite() && sent.report.downtime_ms < 60_000.0);
    assert!(!source.runs(), "the destination said that it runs there");
    assert_eq!(panics().load(Ordering::SeqCst), 0);
}

#[test]
fn a_destination_that_talks_nonsense_after_the_commit_leaves_the_machine_paused() {
    let mut source = maker().busy_guest();
    let sent = meets(&mut source, |heard| match heard {
        Some(ToDestination::Commit { .. }) => vec![Raw(message(&[0xee; 99]))],
        other => honest(other),
    });
    assert_eq!(sent.report.outcome, OutcomeKind::Failed);
    assert!(matches!(sent.left, Left::InDoubt(_)), "{:?}", sent.left);
    assert!(!source.runs());
    assert!(sent.report.reason.contains("stays paused"), "{}", sent.report.reason);
}

#[test]
fn random_bytes_of_a_destination_leave_the_machine_running() {
    let mut source = maker().busy_guest();
    let written = source.written();
    // A script has no seed of its own: it goes on from one to the next.
    static SEED: AtomicU32 = AtomicU32::new(0);
    fn noise() -> Vec<u8> {
        let mut dice = Dice(SEED.fetch_add(1, Ordering::SeqCst).into());
        (0..1 + dice.below(400)).map(|_| dice.roll().to_le_bytes()[0]).collect()
    }
    for n in 0..60 {
        let sent = meets(
            &mut source,
            match n % 3 {
                0 => instead!(None => vec![Raw(noise()), Close]),
                1 => {
                    instead!(Some(ToDestination::Offer { .. }) => vec![Raw(message(&noise())), Close])
                }
                _ => {
                    instead!(Some(ToDestination::RoundEnd { .. }) => vec![Raw(message(&noise())), Close])
                }
            },
        );
        assert!(matches!(sent.left, Left::Running), "{n}: {:?}", sent.report);
    }
    eventually("it goes on", || source.written() > written + 1000);
    assert_eq!(source.wrong(), None);
}

#[test]
fn a_destination_that_never_answers_can_be_left() {
    let mut source = maker().busy_guest();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (connector, listener) = memory::pair(1);
    // Takes every connection, and reads nothing at all.
    runtime.spawn(async move {
        let mut listener = listener;
        let mut held = Vec::new();
        while let Some(Ok(channel)) = listener.accept().await {
            held.push(channel);
        }
    });
    let handle = SendHandle::default();
    std::thread::spawn({
        let handle = handle.clone();
        move || {
            std::thread::sleep(Duration::from_millis(300));
            handle.cancel();
        }
    });
    let began = Instant::now();
    let connector = Arc::new(connector);
    let sent = ferry_migrate::send(&mut source, connector, &options(), &handle, &mut |_| {});
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(sent.report.outcome, OutcomeKind::Cancelled);
    assert!(source.runs());
    goes_on(&source, 100);
}
