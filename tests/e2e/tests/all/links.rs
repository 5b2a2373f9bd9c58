//! Which link a machine goes over: what was asked for, or what answers; and that it is said.

use ferry_e2e::{Hosts, Moved};

const PROCESS: &str = ":process";

fn went(moved: &Moved) -> String {
    moved.report["link"].as_str().expect("words").to_owned()
}

#[test]
fn a_machine_goes_over_the_link_that_was_asked_for_or_that_answers_and_it_is_said() {
    let hosts = Hosts::new();
    let _source = hosts.source.boot("m", PROCESS, &[]);
    let mut here = &hosts.source;
    let mut there = &hosts.destination;
    let mut receivers = Vec::new();
    // What listens, what is asked for, over what it goes, why. Who has received is outside of its sandbox, so that it
    // connects over TCP, too.
    for (listens, asked, over, why) in [
        ("auto", "auto", "TLS to", "it costs less"),
        ("auto", "quic", "QUIC to", "as asked for"),
        ("auto", "tls", "TLS to", "as asked for"),
        ("tls", "auto", "TLS to", "it costs less"),
        ("quic", "auto", "QUIC to", "TCP is not answered"),
    ] {
        let open = ["--once", "--sandbox", "off", "--link", listens];
        let (receiver, to) = there.receive(&open);
        receivers.push(receiver);
        let moved = here.migrate("m", to, &["--mode", "post-copy", "--link", asked]);
        let went = went(moved.completed());
        assert!(went.starts_with(over), "{listens} {asked}: {went}");
        assert!(went.contains(&to.to_string()) && went.contains(why), "{went}");
        there.works("m");
        (here, there) = (there, here);
    }
    // What is not there is not taken for it.
    let (_receiver, to) = there.receive(&["--link", "quic"]);
    let moved = here.migrate("m", to, &["--link", "tls"]);
    moved.stayed("failed", &["refuses connections"]);
    here.works("m");
}

#[test]
fn a_process_in_its_sandbox_takes_machines_in_over_both_links_and_sends_them_on_over_quic() {
    for link in ["quic", "tls"] {
        let hosts = Hosts::new();
        let (home, away) = (&hosts.source, &hosts.destination);
        let _source = home.boot("m", PROCESS, &[]);
        let (_receiver, to) = away.receive(&["--once"]);
        home.migrate("m", to, &["--link", link]).completed();
        away.works("m");
        let (_back, to) = home.receive(&["--once"]);
        let refused = away.migrate("m", to, &["--link", "tls"]);
        refused.stayed("failed", &["was confined", "--link quic", "--sandbox off"]);
        let moved = away.migrate("m", to, &[]);
        let went = went(moved.completed());
        assert!(went.starts_with("QUIC to"), "{went}");
        home.works("m");
    }
}
