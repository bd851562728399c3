//! Replays the stored inputs of the fuzz targets.

use nutshell_fixtures::replay_corpus;

#[test]
fn stored_dhcp_requests_have_valid_answers_or_none() {
    replay_corpus("dhcp", super::answer_request);
}
