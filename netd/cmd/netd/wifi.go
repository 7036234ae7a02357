//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"sekisho/attest"
	"sekisho/netd/internal/api"
	"sekisho/netd/uplink/wpa"
)

// maxJoin bounds a request to join a network, in bytes.
const maxJoin = 4 << 10

// radio is netd's way to networks that want more than a cable.
type radio struct {
	*wpa.Supplicant
	book   *wpa.Book
	access *attest.NetworkAccess
}

// newRadio returns nil if the host domain has no wpa_supplicant.
func newRadio(o options, org *attest.Organization, log *slog.Logger) *radio {
	if o.wpa == "" {
		return nil
	}
	identity, err := readIdentity(o.identity, org.NetworkAccess)
	if err != nil {
		log.Error("no network identity", "err", err) // other networks work without one
	}
	r := &radio{Supplicant: wpa.New(o.wpa, identity, log), access: org.NetworkAccess}
	var fixed []wpa.Network
	if r.access != nil {
		for _, s := range r.access.SSIDs {
			fixed = append(fixed, wpa.Network{SSID: wpa.SSID(s), Security: wpa.Enterprise, Server: r.access.Server, Priority: 100})
		}
	}
	if r.book, err = wpa.OpenBook(wpa.File(o.networks), r.Supplicant, fixed); err != nil {
		log.Error("saved Wi-Fi networks are lost", "err", err)
	}
	return r
}

// wired follows a wired link, if the organisation has switches that ask for 802.1X.
func (r *radio) wired() func(context.Context, string, func(wpa.Facts)) {
	if r.access == nil || !r.access.Wired {
		return nil
	}
	return func(ctx context.Context, name string, report func(wpa.Facts)) {
		r.Wired(ctx, name, r.access.Server, report)
	}
}

// readIdentity reads certificate.pem and key.pem of dir. A laptop without them
// has no network identity, which is no error. A key that is not a plain EC key
// is left for OpenSSL to read: one in the TPM, by a provider.
func readIdentity(dir string, access *attest.NetworkAccess) (*wpa.Identity, error) {
	if dir == "" || access == nil {
		return nil, nil
	}
	chain, err := os.ReadFile(filepath.Join(dir, "certificate.pem"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(chain)
	root, _ := pem.Decode([]byte(access.CA))
	if block == nil || root == nil {
		return nil, fmt.Errorf("%s: no certificate", dir)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if len(cert.DNSNames) != 1 {
		return nil, fmt.Errorf("%s: certificate with %d DNS names, want one", dir, len(cert.DNSNames))
	}
	i := &wpa.Identity{Name: cert.DNSNames[0], Certificate: cert.Raw, CA: root.Bytes, KeyFile: filepath.Join(dir, "key.pem")}
	data, err := os.ReadFile(i.KeyFile)
	if err != nil {
		return nil, err
	}
	if key, _ := pem.Decode(data); key != nil && key.Type == "EC PRIVATE KEY" {
		i.Key, i.KeyFile = key.Bytes, ""
	}
	return i, nil
}

// serve adds Wi-Fi to netd's socket: GET /v1/wifi, POST /v1/wifi/join
// (wpa.Revealed) and POST /v1/wifi/forget ({"ssid": base64}).
func (r *radio) serve(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/wifi", func(w http.ResponseWriter, q *http.Request) {
		list, err := r.book.List(q.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(list)
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
			w.WriteHeader(http.StatusNoContent)
		}
	}
	mux.HandleFunc("POST /v1/wifi/join", change(func(n wpa.Revealed) error { return r.book.Join(n.Hide()) }))
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
	send := func(path string) error {
		body, err := json.Marshal(n)
		if err != nil {
			return err
		}
		return api.Do(ctx, o.socket, "POST", path, bytes.NewReader(body), nil)
	}
	switch {
	case args[0] == "list" && len(names) == 0:
		var list []wpa.Entry
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
		return answer(o, "saved, joining when it is in reach / 保存しました。届く範囲で接続します")
	case args[0] == "forget" && len(names) == 1:
		n = wpa.Revealed{Network: wpa.Network{SSID: wpa.SSID(names[0])}}
		if err := send("/v1/wifi/forget"); err != nil {
			return err
		}
		return answer(o, "forgotten / 削除しました")
	}
	return errUsage
}

func answer(o options, text string) error {
	if o.json {
		return printJSON(os.Stdout, map[string]bool{"done": true})
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

func printNetworks(w io.Writer, list []wpa.Entry) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(w, "no network in reach, none saved / 届く範囲にネットワークがなく、保存もありません")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NETWORK / 名前\tSIGNAL / 電波\tSECURITY / 保護\tSAVED / 保存")
	for _, e := range list {
		signal, kept := "-", ""
		if e.Signal != 0 {
			signal = fmt.Sprintf("%d dBm", e.Signal)
		}
		switch {
		case e.Fixed:
			kept = "organisation / 組織"
		case e.Saved:
			kept = "yes / 済"
		}
		fmt.Fprintf(t, "%q\t%s\t%s\t%s\n", e.Name, signal, e.Security, kept)
	}
	return t.Flush()
}
