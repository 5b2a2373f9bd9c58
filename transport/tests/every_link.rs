//! What every link does: in memory, over QUIC, over TLS.

mod hosts;

use std::time::{Duration, Instant};

use bytes::Bytes;
use ferry_transport::{Channel, Connector, LinkError, Listener, Over, memory};
use hosts::{NETWORKS, connector, hosts, listen, meet};

/// The two ends of a channel over each link, and what the link is called.
async fn on_each() -> Vec<(&'static str, Channel, Channel)> {
    let (left, right) = memory::channel(4);
    let mut all = vec![("memory", left, right)];
    all.extend(on_networks().await);
    all
}

async fn on_networks() -> Vec<(&'static str, Channel, Channel)> {
    let hosts = hosts();
    let mut all = Vec::new();
    for over in NETWORKS {
        let (out, in_) = meet(over, &hosts.left, &hosts.right).await;
        let name = if over == Over::Quic { "QUIC" } else { "TLS" };
        all.push((name, out.unwrap(), in_.unwrap()));
    }
    all
}

async fn read_all(channel: &mut Channel) -> Result<Vec<u8>, LinkError> {
    let mut bytes = Vec::new();
    while let Some(piece) = channel.source.recv().await? {
        assert!(!piece.is_empty());
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn is_lost(e: &LinkError) -> bool {
    matches!(e, LinkError::Lost { .. })
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_arrive_in_both_directions() {
    for (link, mut left, mut right) in on_each().await {
        let bytes: Vec<u8> = (0..=250).cycle().take(20 << 20).collect();
        let sent = Bytes::from(bytes.clone());
        let answer = tokio::spawn(async move {
            let received = read_all(&mut right).await.unwrap();
            right.sink.send(Bytes::from(received)).await.unwrap();
            right.sink.finish().await.unwrap();
            right
        });
        for piece in sent.chunks(1 << 20) {
            left.sink.send(sent.slice_ref(piece)).await.unwrap();
        }
        left.sink.finish().await.unwrap();
        assert!(read_all(&mut left).await.unwrap() == bytes, "{link}");
        assert_eq!(left.source.recv().await.unwrap(), None, "{link}");
        answer.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_directions_carry_at_once_in_pieces_of_any_size() {
    for (link, left, right) in on_each().await {
        let both = [left, right].map(|channel| {
            let Channel { mut sink, mut source, .. } = channel;
            let out = tokio::spawn(async move {
                for n in 0..3000_usize {
                    sink.send(Bytes::from(vec![7; n * n % 5000])).await.unwrap();
                }
                sink.finish().await.unwrap();
                sink
            });
            let in_ = tokio::spawn(async move {
                let mut bytes = 0;
                while let Some(piece) = source.recv().await.unwrap() {
                    assert!(piece.iter().all(|byte| *byte == 7));
                    bytes += piece.len();
                }
                (bytes, source)
            });
            (out, in_)
        });
        let all: usize = (0..3000_usize).map(|n| n * n % 5000).sum();
        let (mut sinks, mut sources) = (Vec::new(), Vec::new());
        for (out, in_) in both {
            let (bytes, source) = in_.await.unwrap();
            assert_eq!(bytes, all, "{link}");
            sources.push(source);
            sinks.push(out.await.unwrap());
        }
    }
}

#[tokio::test]
async fn what_was_finished_can_be_read_after_the_sender_left() {
    for (link, mut left, mut right) in on_each().await {
        left.sink.send(Bytes::from_static(b"all of it")).await.unwrap();
        // Though nobody reads.
        left.sink.finish().await.unwrap();
        assert!(left.sink.send(Bytes::from_static(b"late")).await.is_err(), "{link}");
        drop(left);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(read_all(&mut right).await.unwrap(), b"all of it", "{link}");
        assert_eq!(right.source.recv().await.unwrap(), None, "{link}");
    }
}

#[tokio::test]
async fn who_has_finished_still_hears_the_peer() {
    for (link, mut left, mut right) in on_each().await {
        left.sink.finish().await.unwrap();
        assert_eq!(right.source.recv().await.unwrap(), None, "{link}");
        right.sink.send(Bytes::from_static(b"answer")).await.unwrap();
        right.sink.finish().await.unwrap();
        assert_eq!(read_all(&mut left).await.unwrap(), b"answer", "{link}");
    }
}

#[tokio::test]
async fn a_sink_dropped_without_finish_is_not_a_clean_end() {
    for (link, mut left, mut right) in on_each().await {
        left.sink.send(Bytes::from_static(b"half")).await.unwrap();
        assert_eq!(right.source.recv().await.unwrap().unwrap(), "half", "{link}");
        let Channel { sink, source: _source, .. } = left;
        drop(sink);
        let error = read_all(&mut right).await.unwrap_err();
        assert!(is_lost(&error), "{link}: {error}");
    }
}

#[tokio::test]
async fn a_channel_dropped_whole_is_not_a_clean_end() {
    for (link, left, mut right) in on_each().await {
        drop(left);
        let error = read_all(&mut right).await.unwrap_err();
        assert!(is_lost(&error), "{link}: {error}");
    }
}

#[tokio::test]
async fn who_sends_to_a_peer_that_reads_no_more_is_told() {
    for (link, mut left, right) in on_each().await {
        let Channel { source, sink: _sink, .. } = right;
        drop(source);
        let began = Instant::now();
        let error = loop {
            match left.sink.send(Bytes::from_static(b"x")).await {
                Ok(()) => tokio::task::yield_now().await,
                Err(e) => break e,
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{link}");
        };
        assert!(is_lost(&error), "{link}: {error}");
    }
}

#[tokio::test]
async fn a_sender_waits_while_the_receiver_does_not_read() {
    for (link, mut left, _right) in on_each().await {
        let piece = Bytes::from(vec![1; 1 << 20]);
        let mut mib = 0;
        while let Ok(sent) =
            tokio::time::timeout(Duration::from_secs(1), left.sink.send(piece.clone())).await
        {
            sent.unwrap();
            mib += 1;
            assert!(mib < 64, "no back-pressure: {link}");
        }
    }
}

#[tokio::test]
async fn a_peer_that_closes_says_why_and_frees_who_waits() {
    for (link, mut left, right) in on_each().await {
        let Channel { mut sink, mut source, .. } = right;
        let blocked = tokio::spawn(async move {
            let piece = Bytes::from(vec![1; 1 << 20]);
            loop {
                if let Err(e) = sink.send(piece.clone()).await {
                    break (sink, e);
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        left.sink.close("cancelled by the operator").await;
        let (mut sink, error) = blocked.await.unwrap();
        let by_reason = |e: &LinkError| matches!(e, LinkError::Closed { reason, .. } if reason == "cancelled by the operator");
        assert!(by_reason(&error), "{link}: {error}");
        let error = source.recv().await.unwrap_err();
        assert!(by_reason(&error), "{link}: {error}");
        let error = sink.send(Bytes::from_static(b"x")).await.unwrap_err();
        assert!(by_reason(&error), "{link}: {error}");
        assert!(read_all(&mut left).await.is_err(), "{link}");
    }
}

#[tokio::test]
async fn a_reason_arrives_though_nobody_reads_what_was_sent_before_it() {
    for (link, mut left, mut right) in on_networks().await {
        let piece = Bytes::from(vec![1; 1 << 20]);
        let second = Duration::from_secs(1);
        while tokio::time::timeout(second, left.sink.send(piece.clone())).await.is_ok() {}
        left.sink.close("out of patience").await;
        let error = loop {
            match right.sink.send(Bytes::from_static(b"x")).await {
                Ok(()) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(e) => break e,
            }
        };
        assert!(error.to_string().contains("out of patience"), "{link}: {error}");
    }
}

#[tokio::test]
async fn words_of_a_peer_that_closes_are_one_plain_line() {
    for (link, mut left, mut right) in on_networks().await {
        let words = format!("\u{1b}[2J\n{}", "ä".repeat(400));
        left.sink.close(&words).await;
        let error = read_all(&mut right).await.unwrap_err().to_string();
        assert!(error.contains("[2J") && error.contains("ää"), "{link}: {error}");
        assert!(!error.contains(char::is_control), "{link}: {error}");
    }
}

/// Lives on a runtime that stops being driven, as a stopped process would.
async fn falls_silent(over: Over) -> (LinkError, Duration) {
    let hosts = hosts();
    let (mut listener, addr) = listen(over, &hosts.right);
    let connector = connector(over, &hosts.left, addr);
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let channel = runtime.block_on(connector.connect()).unwrap();
        let _ = stopped.recv();
        drop((runtime, channel));
    });
    let mut channel = listener.accept().await.unwrap().unwrap();
    let start = Instant::now();
    let error = read_all(&mut channel).await.unwrap_err();
    let took = start.elapsed();
    drop(stop);
    thread.join().unwrap();
    (error, took)
}

#[tokio::test]
async fn a_peer_that_falls_silent_is_given_up_in_seconds() {
    let both = tokio::join!(falls_silent(Over::Quic), falls_silent(Over::Tls));
    for (error, took) in [both.0, both.1] {
        assert!(matches!(error, LinkError::TimedOut { seconds: 5, .. }), "{error}");
        assert!(took >= Duration::from_secs(4), "{took:?}");
    }
}

#[tokio::test]
async fn an_idle_channel_stays_open() {
    let mut all = on_each().await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    for (link, left, right) in &mut all {
        left.sink.send(Bytes::from_static(b"still here")).await.unwrap();
        assert_eq!(right.source.recv().await.unwrap().unwrap(), "still here", "{link}");
    }
}

#[tokio::test]
async fn a_channel_whose_runtime_ends_tells_both_sides() {
    let hosts = hosts();
    for over in NETWORKS {
        let (mut listener, addr) = listen(over, &hosts.right);
        let connector = connector(over, &hosts.left, addr);
        let connecting = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(connector.connect()).unwrap()
        });
        let mut far = listener.accept().await.unwrap().unwrap();
        let mut near = tokio::task::spawn_blocking(|| connecting.join().unwrap()).await.unwrap();
        let began = Instant::now();
        let error = read_all(&mut far).await.unwrap_err();
        assert!(!matches!(error, LinkError::Closed { .. }), "{over}: {error}");
        if over == Over::Tls {
            assert!(is_lost(&near.source.recv().await.unwrap_err()), "{over}");
            near.sink.close("though nobody carries it").await;
        }
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
