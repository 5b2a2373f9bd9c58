//! The in-memory link, and messages and frames over it.

use std::time::Duration;

use bytes::Bytes;
use ferry_transport::memory::{self, channel};
use ferry_transport::{Connector, FrameReader, LinkError, Listener, send_message};

#[tokio::test]
async fn bytes_come_in_order_and_end_with_finish() {
    let (connector, mut listener) = memory::pair(4);
    let (ours, theirs) = tokio::join!(connector.connect(), listener.accept());
    let (mut ours, mut theirs) = (ours.unwrap(), theirs.unwrap().unwrap());
    for piece in [&b"one"[..], b"", b"two"] {
        ours.sink.send(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    ours.sink.finish().await.unwrap();
    assert!(ours.sink.send(Bytes::from_static(b"late")).await.is_err());
    drop(ours);
    assert_eq!(theirs.source.recv().await.unwrap().unwrap(), "one");
    assert_eq!(theirs.source.recv().await.unwrap().unwrap(), "two");
    assert_eq!(theirs.source.recv().await.unwrap(), None);
    assert_eq!(theirs.source.recv().await.unwrap(), None);
    drop(connector);
    assert!(listener.accept().await.is_none());
}

#[tokio::test]
async fn a_sink_dropped_without_finish_is_not_a_clean_end() {
    let (mut left, mut right) = channel(4);
    left.sink.send(Bytes::from_static(b"half")).await.unwrap();
    drop(left);
    assert_eq!(right.source.recv().await.unwrap().unwrap(), "half");
    assert!(matches!(right.source.recv().await, Err(LinkError::Lost { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_full_link_makes_the_sender_wait() {
    let (mut left, mut right) = channel(2);
    let mut sent = 0;
    let wait = Duration::from_secs(1);
    while tokio::time::timeout(wait, left.sink.send(Bytes::from_static(b"x"))).await.is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 2);
    right.source.recv().await.unwrap();
    tokio::time::timeout(wait, left.sink.send(Bytes::from_static(b"x"))).await.unwrap().unwrap();
}

#[tokio::test]
async fn closing_tells_the_reason_and_frees_a_waiting_peer() {
    let (mut left, mut right) = channel(1);
    left.sink.send(Bytes::from_static(b"x")).await.unwrap();
    let blocked = tokio::spawn(async move { left.sink.send(Bytes::from_static(b"y")).await });
    tokio::task::yield_now().await;
    right.sink.close("cancelled by the operator").await;
    let error = blocked.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("cancelled by the operator"), "{error}");
}

#[tokio::test]
async fn messages_come_back_whole_however_they_are_cut() {
    let messages: Vec<Vec<u8>> = [0usize, 1, 3, 4, 5, 1000, 70_000]
        .iter()
        .map(|n| (0..=250).cycle().take(*n).collect())
        .collect();
    for cut in [1usize, 2, 7, 4096, usize::MAX] {
        // What `send_message` writes, gathered and cut anew.
        let (mut left, right) = channel(1000);
        for message in &messages {
            send_message(&mut *left.sink, message).await.unwrap();
        }
        left.sink.finish().await.unwrap();
        let mut source = right.source;
        let mut bytes = Vec::new();
        while let Some(piece) = source.recv().await.unwrap() {
            bytes.extend_from_slice(&piece);
        }
        let (mut left, right) = channel(8);
        tokio::spawn(async move {
            for piece in bytes.chunks(cut.min(bytes.len())) {
                left.sink.send(Bytes::copy_from_slice(piece)).await.unwrap();
            }
            left.sink.finish().await.unwrap();
        });
        let mut reader = FrameReader::new(right.source);
        for message in &messages {
            assert_eq!(reader.read_message(70_000).await.unwrap().unwrap(), message, "cut {cut}");
        }
        assert_eq!(reader.read_message(70_000).await.unwrap(), None);
    }
}

#[tokio::test]
async fn fill_gives_the_bytes_asked_for_and_nothing_after_the_end() {
    let (mut left, right) = channel(8);
    for piece in [&b"abc"[..], b"defgh", b"ij"] {
        left.sink.send(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    left.sink.finish().await.unwrap();
    let mut reader = FrameReader::new(right.source);
    assert_eq!(reader.fill(2).await.unwrap().unwrap(), b"ab");
    assert_eq!(reader.fill(0).await.unwrap().unwrap(), b"");
    assert_eq!(reader.fill(3).await.unwrap().unwrap(), b"cde");
    assert_eq!(reader.fill(3).await.unwrap().unwrap(), b"fgh");
    let error = reader.fill(3).await.unwrap_err();
    assert_eq!(error, LinkError::Truncated { expected: 3, found: 2 });
    assert_eq!(reader.fill(1).await.unwrap(), None);
}

#[tokio::test]
async fn a_message_longer_than_allowed_is_refused_before_it_arrives() {
    let (mut left, right) = channel(8);
    left.sink.send(Bytes::copy_from_slice(&u32::MAX.to_le_bytes())).await.unwrap();
    let mut reader = FrameReader::new(right.source);
    let error = reader.read_message(1 << 20).await.unwrap_err();
    assert_eq!(error, LinkError::TooLong { bytes: u32::MAX.into(), max: 1 << 20 });
}

#[tokio::test]
async fn a_message_cut_short_is_told_from_a_clean_end() {
    let (mut left, right) = channel(8);
    left.sink.send(Bytes::copy_from_slice(&10u32.to_le_bytes())).await.unwrap();
    left.sink.send(Bytes::from_static(b"1234")).await.unwrap();
    left.sink.finish().await.unwrap();
    let mut reader = FrameReader::new(right.source);
    let error = reader.read_message(100).await.unwrap_err();
    assert_eq!(error, LinkError::Truncated { expected: 10, found: 4 });
}
