"""KFP components: thin typed wrappers around pure functions of the rooms below."""
