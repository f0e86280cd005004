//! What one session has seen, as the token that its reads carry. Knows no network.

use holdfast_proto::Token;
use parking_lot::Mutex;

/// One user's view of the cluster: it never goes backwards.
#[derive(Default)]
pub(crate) struct Session {
    token: Mutex<Token>,
}

impl Session {
    pub(crate) fn token(&self) -> Token {
        self.token.lock().clone()
    }

    pub(crate) fn see(&self, token: &Token) {
        self.token.lock().merge(token);
    }

    /// The token is from before a restore: what it has seen can be seen no more. One that was
    /// renewed meanwhile stays.
    pub(crate) fn forget_epoch(&self, epoch: u64) {
        let mut token = self.token.lock();
        if token.epoch() == epoch {
            *token = Token::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(epoch: u64, revision: u64) -> Token {
        let mut token = Token::new(epoch);
        token.see(0, revision);
        token
    }

    #[test]
    fn a_session_never_forgets_what_it_has_seen() {
        let session = Session::default();
        session.see(&token(1, 7));
        session.see(&token(1, 3));
        assert_eq!(session.token().revision(0), 7);
        session.see(&token(2, 1));
        assert_eq!(
            (session.token().epoch(), session.token().revision(0)),
            (2, 1)
        );
    }

    #[test]
    fn a_token_from_before_a_restore_is_let_go_but_not_a_newer_one() {
        let session = Session::default();
        session.see(&token(1, 7));
        session.forget_epoch(1);
        assert!(session.token().is_empty());
        session.see(&token(2, 4));
        session.forget_epoch(1);
        assert_eq!(session.token().revision(0), 4);
    }
}
