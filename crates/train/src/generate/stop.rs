//! Stop strings: text ends before the first of them, however tokens cut it.

/// Passes text on as it comes, up to the first stop string. What may be the beginning of one is
/// held back until it is known.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Watches for `stops`; empty ones are passed over.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty());
        Self {
            stops: stops.cloned().collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece; returns what is sure to be shown.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop));
        if let Some(at) = found.min() {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        // The longest end that begins a stop string waits.
        let begins = |end: &str| self.stops.iter().any(|stop| stop.starts_with(end));
        let mut ends = self.held.char_indices().map(|(at, _)| at);
        let at = ends.find(|&at| begins(&self.held[at..]));
        let rest = self.held.split_off(at.unwrap_or(self.held.len()));
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back when the text ended by itself.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of `pieces`, and whether they were stopped.
    fn shown(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut filter = StopStrings::new(&stops);
        let mut text = String::new();
        for piece in pieces {
            text += &filter.push(piece);
            if filter.stopped() {
                return (text, true);
            }
        }
        (text + &filter.finish(), false)
    }

    #[test]
    fn a_stop_string_may_span_pieces() {
        assert_eq!(shown(&["END"], &["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(shown(&["END"], &["a E", "Nx"]), ("a ENx".into(), false));
        // The second E is where it begins.
        assert_eq!(shown(&["END"], &["E", "E", "ND"]), ("E".into(), true));
        assert_eq!(shown(&["aab"], &["aaa", "b"]), ("a".into(), true));
        assert_eq!(shown(&["é!"], &["caf", "é", "!"]), ("caf".into(), true));
        // The earliest counts, whichever is named first.
        assert_eq!(shown(&["b", "ab"], &["xab"]), ("x".into(), true));
        assert_eq!(shown(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(shown(&[""], &["a"]), ("a".into(), false));
    }

    /// Nothing but a possible beginning is held back, wherever the text is cut.
    #[test]
    fn every_cut_shows_the_same() {
        let text = "one two stop there";
        for cut in 0..=text.len() {
            let pieces = [&text[..cut], &text[cut..]];
            let expected = ("one two ".to_string(), true);
            assert_eq!(shown(&["stop"], &pieces), expected, "{cut}");
            assert_eq!(shown(&["stopp"], &pieces), (text.to_string(), false));
        }
        let mut filter = StopStrings::new(&["stop".into()]);
        assert_eq!(filter.push("one s"), "one ");
        assert_eq!(filter.push("ky"), "sky");
    }
}
