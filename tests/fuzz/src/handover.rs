//! Firecracker's hand-over: the message in which a machine's memory is described.

use ferry_firecracker::{Handover, HandoverError};

/// The message, as far as it came.
pub fn handover(data: &[u8]) {
    let handover = match Handover::parse(data) {
        Ok(Some(handover)) => handover,
        Ok(None) => return,
        Err(e) => return assert!(e.to_string().contains("hand-over")),
    };
    // Nothing before the end was a whole message.
    let cut = data.trim_ascii_end().len() - 1;
    assert!(matches!(Handover::parse(&data[..cut]), Ok(None)));

    let (pages, bytes) = (handover.pages(), handover.page_bytes());
    assert!(bytes.is_power_of_two() && pages > 0);
    let whole = handover.check(pages * bytes, "it").is_ok();
    let other = handover.check(pages * bytes + bytes, "it");
    assert!(matches!(other, Err(HandoverError::OtherMemory { .. })));
    // Regions one by one, from the lowest page on: an address leads to its page and back.
    let (mut page, mut found) = (0, 0);
    while found < pages {
        let Some((address, run)) = handover.address_of(page) else {
            assert!(!whole, "a hole at page {page} of {pages}");
            break;
        };
        for inside in [0, run / 2, run - 1] {
            let at = address + inside * bytes;
            assert_eq!(handover.page_at(at + bytes - 1), Some(page + inside));
            assert_eq!(handover.address_of(page + inside), Some((at, run - inside)));
        }
        let all = handover.pages_between(address, address + run * bytes).expect("it is a region");
        assert_eq!((all.start, all.pages), (page, run));
        (page, found) = (page + run, found + run);
    }
}
