package gateway

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// PrintStatus writes st for people, or as JSON.
func PrintStatus(w io.Writer, st Status, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(st)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s on %s since %s: %s, %d devices known in %s, %d requests refused\n",
		st.State, st.Listen, st.Since.Format(time.DateTime), st.Detail, st.Leases, st.Pool, st.Refused)
	if len(st.Sessions) > 0 {
		fmt.Fprintln(t, "INNER\tDEVICE\tREMOTE\tSINCE\tUNTIL\tTO LAPTOP\tFROM LAPTOP\tDROPPED")
	}
	for _, s := range st.Sessions {
		fmt.Fprintf(t, "%s\t%.16s\t%s\t%s\t%s\t%d B\t%d B\t%d\n", s.Inner, s.Device, s.Remote,
			s.Since.Format(time.DateTime), s.Until.Format(time.DateTime), s.Counters.SentBytes, s.Counters.ReceivedBytes, s.Counters.Dropped)
	}
	return t.Flush()
}
