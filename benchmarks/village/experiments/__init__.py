"""The findings of the papers, looked for on the village: `bylaw experiment NAME`."""
