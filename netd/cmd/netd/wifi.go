//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"sekisho/attest"
	"sekisho/netd"
	"sekisho/netd/access"
	"sekisho/netd/internal/api"
	"sekisho/netd/uplink/wpa"
)

// maxJoin bounds a request to join a network, in bytes.
const maxJoin = 4 << 10

// radio is netd's way to networks that want more than a cable.
type radio struct {
	*wpa.Supplicant
	*access.Keeper
	book *wpa.Book
	want *attest.NetworkAccess
}

// newRadio returns nil if the host domain has no wpa_supplicant.
func newRadio(o options, org *attest.Organization, vault access.Vault, log *slog.Logger) *radio {
	if o.wpa == "" {
		return nil
	}
	r := &radio{Supplicant: wpa.New(o.wpa, log), want: org.NetworkAccess}
	var err error
	r.Keeper, err = access.New(access.Config{
		Vault: vault, File: o.networks, Access: org.NetworkAccess, Identify: r.SetIdentity, Now: time.Now, Log: log,
		Loaded: func(list []wpa.Network) {
			if err := r.book.Adopt(list); err != nil {
				log.Error("saved Wi-Fi networks", "err", err)
			}
		},
	})
	if err != nil {
		log.Error("what an earlier netd left of saved networks is lost", "err", err)
	}
	var fixed []wpa.Network
	if r.want != nil {
		for _, s := range r.want.SSIDs {
			fixed = append(fixed, wpa.Network{SSID: wpa.SSID(s), Security: wpa.Enterprise, Server: r.want.Server, Priority: 100})
		}
	}
	if r.book, err = wpa.OpenBook(r.Keeper, r.Supplicant, fixed); err != nil {
		log.Error("saved Wi-Fi networks are lost", "err", err)
	}
	return r
}

// wired follows a wired link, if the organisation has switches that ask for 802.1X.
func (r *radio) wired() func(context.Context, string, func(wpa.Facts)) {
	if r.want == nil || !r.want.Wired {
		return nil
	}
	return func(ctx context.Context, name string, report func(wpa.Facts)) {
		r.Wired(ctx, name, r.want.Server, report)
	}
}

// settleTime is how long the answer to a change waits for it to be kept.
const settleTime = 5 * time.Second

// networks is the answer to GET /v1/wifi.
type networks struct {
	Networks []wpa.Entry `json:"networks"`
	Access   netd.Access `json:"access"`
}

// serve adds Wi-Fi to netd's socket: GET /v1/wifi, POST /v1/wifi/join
// (wpa.Revealed), /v1/wifi/prefer and /v1/wifi/forget ({"ssid": base64}), which
// answer with netd.Access.
func (r *radio) serve(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/wifi", func(w http.ResponseWriter, q *http.Request) {
		list, err := r.book.List(q.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(networks{list, r.Status()})
	})
	change := func(do func(wpa.Revealed) error) http.HandlerFunc {
		return func(w http.ResponseWriter, q *http.Request) {
			var n wpa.Revealed
			d := json.NewDecoder(http.MaxBytesReader(w, q.Body, maxJoin))
			d.DisallowUnknownFields()
			if err := d.Decode(&n); err != nil {
				http.Error(w, "not a network", http.StatusBadRequest) // the error might repeat a passphrase
				return
			}
			if err := do(n); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			ctx, cancel := context.WithTimeout(q.Context(), settleTime)
			defer cancel()
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(r.Settled(ctx))
		}
	}
	mux.HandleFunc("POST /v1/wifi/join", change(func(n wpa.Revealed) error { return r.book.Join(n.Hide()) }))
	mux.HandleFunc("POST /v1/wifi/prefer", change(func(n wpa.Revealed) error { return r.book.Prefer(n.SSID) }))
	mux.HandleFunc("POST /v1/wifi/forget", change(func(n wpa.Revealed) error { return r.book.Forget(n.SSID) }))
}

// wifi is "netd wifi".
func wifi(ctx context.Context, o options, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	n := wpa.Revealed{Network: wpa.Network{Security: wpa.Personal}}
	flags := flag.NewFlagSet("netd wifi "+args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.socket, "socket", o.socket, "")
	flags.BoolVar(&o.json, "json", o.json, "")
	flags.BoolVar(&n.Hidden, "hidden", false, "")
	open := flags.Bool("open", false, "")
	server := flags.String("server", "", "")
	var names []string
	for rest := args[1:]; ; { // flags may stand before and after the name
		if flags.Parse(rest) != nil {
			return errUsage
		}
		if flags.NArg() == 0 {
			break
		}
		names, rest = append(names, flags.Arg(0)), flags.Args()[1:]
	}
	var kept netd.Access
	send := func(path string) error {
		body, err := json.Marshal(n)
		if err != nil {
			return err
		}
		return api.Do(ctx, o.socket, "POST", path, bytes.NewReader(body), &kept)
	}
	switch {
	case args[0] == "list" && len(names) == 0:
		var list networks
		if err := api.Do(ctx, o.socket, "GET", "/v1/wifi", nil, &list); err != nil {
			return fmt.Errorf("%w; is netd running, with wpa_supplicant?", err)
		}
		if o.json {
			return printJSON(os.Stdout, list)
		}
		return printNetworks(os.Stdout, list)
	case args[0] == "join" && len(names) == 1:
		n.SSID = wpa.SSID(names[0])
		switch {
		case *open:
			n.Security = wpa.Open
		case *server != "":
			n.Security, n.Server = wpa.Enterprise, *server
		default:
			secret, err := readSecret(os.Stdin)
			if err != nil {
				return err
			}
			n.Passphrase = secret
		}
		if err := send("/v1/wifi/join"); err != nil {
			return err
		}
		return answer(o, "saved, joining when it is in reach / 保存しました。届く範囲で接続します", kept)
	case (args[0] == "forget" || args[0] == "prefer") && len(names) == 1:
		n = wpa.Revealed{Network: wpa.Network{SSID: wpa.SSID(names[0])}}
		if err := send("/v1/wifi/" + args[0]); err != nil {
			return err
		}
		return answer(o, map[string]string{"forget": "forgotten / 削除しました", "prefer": "joined before all others / 優先して接続します"}[args[0]], kept)
	}
	return errUsage
}

// answer says what was done, and what becomes of it at power-off unless it is
// kept.
func answer(o options, text string, a netd.Access) error {
	if o.json {
		return printJSON(os.Stdout, a)
	}
	if w := a.Words(); a.State != netd.AccessKept {
		text += fmt.Sprintf("\n%s / %s (%s)", w.EN, w.JA, a.Detail)
	}
	_, err := fmt.Println(text)
	return err
}

// readSecret reads a passphrase from the first line of r: not from the
// arguments, which everybody can read.
func readSecret(r io.Reader) (string, error) {
	fmt.Fprintln(os.Stderr, "passphrase / パスワード:")
	line, err := bufio.NewReader(io.LimitReader(r, 256)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return strings.TrimRight(line, "\r\n"), nil
}

func printNetworks(w io.Writer, n networks) error {
	if a := n.Access; a.State != netd.AccessKept {
		fmt.Fprintf(w, "%s / %s (%s)\n", a.Words().EN, a.Words().JA, a.Detail)
	}
	if len(n.Networks) == 0 {
		_, err := fmt.Fprintln(w, "no network in reach, none saved / 届く範囲にネットワークがなく、保存もありません")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NETWORK / 名前\tSIGNAL / 電波\tSECURITY / 保護\tSAVED / 保存")
	for _, e := range n.Networks {
		signal, kept := "-", ""
		if e.Signal != 0 {
			signal = fmt.Sprintf("%d dBm", e.Signal)
		}
		switch {
		case e.Fixed:
			kept = "organisation / 組織"
		case e.Saved:
			kept = fmt.Sprintf("%d / 優先順位 %d", e.Rank, e.Rank)
		}
		fmt.Fprintf(t, "%q\t%s\t%s\t%s\n", e.Name, signal, e.Security, kept)
	}
	return t.Flush()
}
