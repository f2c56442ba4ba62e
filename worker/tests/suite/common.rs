//! What several test files need.

use fairlead_worker::{
    Result,
    energy::{Answer, Candidate, Energy, Render, Sample, Sources, Terms, Verdict},
    turn::Turn,
};

/// The energy of a policy without concepts: asking it is a bug.
pub(crate) struct NoEnergy;

impl Energy for NoEnergy {
    fn evaluate(
        &mut self,
        _: &Terms,
        _: &[Sample],
        _: &mut Render<'_>,
        _: &Turn<'_>,
    ) -> Result<Vec<Answer>> {
        panic!("no energy is to be asked");
    }

    fn check(&mut self, _: &Terms, _: &[Candidate], _: &Turn<'_>) -> Result<Vec<Verdict>> {
        panic!("no energy is to be asked");
    }

    fn sources(&self) -> &Sources {
        static NONE: Sources = Sources {
            nodes: std::collections::BTreeSet::new(),
            calibrations: std::collections::BTreeSet::new(),
        };
        &NONE
    }
}

/// RGB8 values of a PNG.
pub(crate) fn pixels(png: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().expect("a PNG");
    let mut data = vec![0; reader.output_buffer_size().expect("a small picture")];
    reader.next_frame(&mut data).expect("a frame");
    data
}
